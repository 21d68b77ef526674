"""Adapters of the vectors of HLFD and its baselines."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import distill, losses
from jaxkd.layers import Outputs


def distill_hlfd_imd(v):
    exponent = v.hp("exponent")

    def loss(x):
        return jnp.mean(
            losses.importance_map_distillation(
                x["in_feat_s"], x["in_feat_t"], exponent=exponent
            )
        )

    return v.differentiate(loss)


def distill_hlfd_imd_uni(v):
    exponent = v.hp("exponent")

    def loss(x):
        return jnp.mean(
            losses.unified_importance_map_distillation(
                x["in_feat_s"], _numbered(v, x, "in_t"), exponent=exponent
            )
        )

    return v.differentiate(loss)


def distill_hlfd_ifd_imd(v):
    exponent = v.hp("exponent")

    def loss(x):
        return jnp.mean(
            losses.concatenated_importance_map_distillation(
                _numbered(v, x, "in_s"), x["in_feat_t"], exponent=exponent
            )
        )

    return v.differentiate(loss)


def distill_hlfd_pmd(v):
    temperature = v.hp("temperature")

    def loss(x):
        return jnp.mean(
            losses.prediction_map_distillation(
                x["in_map_s"],
                x["in_map_t"],
                x["w_proj_kernel"],
                x["w_proj_bias"],
                temperature=temperature,
            )
        )

    return v.differentiate(loss)


def distill_hlfd_pmd_uni(v):
    temperature = v.hp("temperature")

    def loss(x):
        return jnp.mean(
            losses.unified_prediction_map_distillation(
                x["in_map_s"],
                _numbered(v, x, "in_t"),
                x["w_proj_kernel"],
                x["w_proj_bias"],
                temperature=temperature,
            )
        )

    return v.differentiate(loss)


def distill_hlfd_ifd_pmd(v):
    temperature = v.hp("temperature")

    def loss(x):
        return jnp.mean(
            losses.concatenated_prediction_map_distillation(
                _numbered(v, x, "in_s"),
                x["in_map_t"],
                x["w_proj_kernel"],
                x["w_proj_bias"],
                temperature=temperature,
            )
        )

    return v.differentiate(loss)


def distill_hlfd_segloss(v):
    gamma, smooth, weight = v.hp("gamma"), v.hp("smooth"), v.hp("ce_weight")

    def loss(x):
        focal = jnp.mean(losses.focal(x["in_logits"], x["in_mask"], gamma=gamma))
        dice = jnp.mean(losses.batch_dice(x["in_logits"], x["in_mask"], smooth=smooth))
        parts = {"focal": focal, "dice": dice}
        return weight * focal + (1.0 - weight) * dice, parts

    return v.differentiate(loss)


def distill_hlfd_total(v):
    """The registered method on taps, with the projections that the code drew."""
    alpha, beta = v.hp("alpha"), v.hp("beta")

    def taps_of(prefix):
        return [k.removeprefix(f"in_{prefix}_") for k in v.keys(f"in_{prefix}_[ed].*")]

    def projections(x):
        names = [
            re.findall(r"w_proj_(.*)_kernel", k)[0] for k in v.keys("w_proj_.*_kernel")
        ]
        return {
            name: {
                "kernel": x[f"w_proj_{name}_kernel"],
                "bias": x[f"w_proj_{name}_bias"],
            }
            for name in names
        }

    method = distill.weighted(
        {"seg": 1.0, "hlfd": 1.0},
        seg={"name": "focal_dice"},
        hlfd={
            "alpha": alpha,
            "beta": beta,
            "exponent": v.hp("exponent"),
            "temperature": v.hp("temperature"),
            "projection": "fixed",
        },
    )

    def loss(x):
        teacher_taps = {tap: x[f"in_t_{tap}"] for tap in [*taps_of("t"), "out"]}
        total, means = v.apply(
            method,
            student=Outputs(
                logits=x["in_s_out"],
                taps={tap: x[f"in_s_{tap}"] for tap in taps_of("s")},
            ),
            teachers=(Outputs(logits=x["in_t_out"], taps=teacher_taps),),
            batch={"label": jnp.argmax(x["in_mask"], axis=-1)},
            state=lambda params, memory: (params, {**memory, "hlfd": projections(x)}),
        )
        parts = {
            "seg": sum(
                method.weights[term] * means[term] for term in ("seg/focal", "seg/dice")
            ),
            "plfd": means["hlfd/plfd"],
            "flfd": means["hlfd/flfd"],
        }
        return total, parts

    return v.differentiate(loss)


def distill_emkd_rad(v):
    def loss(x):
        return jnp.mean(
            losses.region_affinity(x["in_feat_s"], x["in_feat_t"], x["in_mask"][..., 1])
        )

    return v.differentiate(loss)


def distill_hlfd_metrics(v):
    from jaxkd import metrics

    scores = metrics.hlfd_scores(
        np.asarray(jax.nn.softmax(v["in_logits"], axis=-1))[..., 1],
        v.numpy("in_mask")[..., 1] > 0,
        v.numpy("in_case_id"),
        threshold=v.hp("threshold"),
    )
    return {
        "out_loss": scores["dice"],
        **{f"out_{name}": score for name, score in scores.items()},
    }


def _numbered(v, x, prefix):
    return [x[key] for key in v.keys(rf"{prefix}\d+")]
