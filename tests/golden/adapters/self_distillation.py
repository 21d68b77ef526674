"""Adapters of self-distillation, mutual learning, and early classifiers."""

import jax
import jax.numpy as jnp

from jaxkd import distill, losses
from jaxkd.layers import Outputs


def distill_uskd(v):
    return v.differentiate(lambda x: _uskd(v, x, {"label": x["in_labels"]}))


def distill_uskd_softlabel(v):
    return v.differentiate(lambda x: _uskd(v, x, {"target": x["in_soft_labels"]}))


def _uskd(v, x, batch):
    weights = {name: v.hp(name) for name in ("alpha", "beta", "mu")}
    assert x["in_logits_s"].shape[-1] == v.hp("num_classes")
    taps = {"stage1": x["in_feat_mid"], "stage2": x["in_feat_mid"][:, :1]}
    head = {"kernel": x["w_fc_kernel"], "bias": x["w_fc_bias"]}
    return v.apply(
        distill.create("uskd", **weights),
        student=Outputs(logits=x["in_logits_s"], taps=taps),
        batch=batch,
        state=lambda params, memory: ({"weak": head}, memory),
    )


def distill_pskd(v):
    epoch, epochs = v.hp("epoch"), v.hp("end_epoch")
    method = distill.create("pskd", alpha=v.hp("alpha_T"))

    def loss(x):
        records = x["in_labels"].shape[0]
        total, _ = v.apply(
            method,
            student=Outputs(logits=x["in_logits_s"], taps={}),
            batch={"label": x["in_labels"], "index": jnp.arange(records)},
            state=lambda params, memory: (
                params,
                {"probabilities": x["in_past_probs"], "seen": jnp.ones(records, bool)},
            ),
            data={"records": records, "epochs": epochs},
            epoch=epoch,
        )
        targets = losses.pskd_targets(
            x["in_past_probs"], x["in_labels"], alpha=v.hp("alpha_t")
        )
        return total, {"soft_targets": targets}

    return v.differentiate(loss)


def distill_tfkd_reg(v):
    method = distill.create(
        "tfkd_reg",
        alpha=v.hp("alpha"),
        temperature=v.hp("temperature"),
        multiplier=v.hp("multiplier"),
        correct_probability=v.hp("correct_prob"),
    )

    def loss(x):
        student = Outputs(logits=x["in_logits_s"], taps={})
        return v.apply(method, student=student, batch={"label": x["in_labels"]})[0]

    return v.differentiate(loss)


def distill_tfkd_self(v):
    method = distill.create(
        "tfkd_self",
        alpha=v.hp("alpha"),
        temperature=v.hp("temperature"),
        multiplier=v.hp("multiplier"),
    )

    def loss(x):
        return v.apply(
            method,
            student=Outputs(logits=x["in_logits_s"], taps={}),
            teachers=(Outputs(logits=x["in_logits_t"], taps={}),),
            batch={"label": x["in_labels"]},
        )[0]

    return v.differentiate(loss)


def distill_byot(v):
    temperature = v.hp("temperature")
    weights = distill.create(
        "byot", alpha=v.hp("alpha"), beta=v.hp("beta"), temperature=temperature
    ).weights
    early = [key.removeprefix("in_logits_") for key in v.keys(r"in_logits_\d+")]

    def loss(x):
        final, labels = x["in_logits_final"], x["in_labels"]
        parts = {"ce": jnp.mean(losses.cross_entropy(final, labels))}
        parts |= {"kd": 0.0, "feature": 0.0}
        for i in early:
            logits, feature = x[f"in_logits_{i}"], x[f"in_feat_{i}"]
            parts["ce"] += jnp.mean(losses.cross_entropy(logits, labels))
            soft = losses.kd_cross_entropy(logits, final, temperature=temperature)
            parts["kd"] += jnp.mean(soft)
            hint = losses.byot_feature(feature, x["in_feat_final"])
            parts["feature"] += jnp.mean(hint)
        return sum(weights[k] * value for k, value in parts.items()), parts

    return v.differentiate(loss)


def distill_dml(v):
    keys = v.keys(r"in_logits_\d+")
    method = distill.create("dml", students=len(keys), eps=v.hp("eps"), reduction="sum")

    def loss(x):
        outputs = [Outputs(logits=x[key], taps={}) for key in keys]
        total, means = v.apply(
            method,
            student=outputs[0].replace(peers=tuple(outputs[1:])),
            batch={"label": x["in_labels"]},
        )
        own, parts = [], {}
        for i, student in enumerate(outputs):
            peers = [o.logits for j, o in enumerate(outputs) if j != i]
            kl = sum(
                jnp.mean(losses.dml(student.logits, peer, eps=v.hp("eps")))
                for peer in peers
            )
            ce = jnp.mean(losses.cross_entropy(student.logits, x["in_labels"]))
            own.append(ce + kl)
            parts |= {f"kl_{i + 1}": kl} | ({f"loss_{i + 1}": ce + kl} if i else {})
        # The method's value is the sum over all students; its gradient by the first
        # student's logits is that of the first student's own loss.
        return total - jax.lax.stop_gradient(sum(own[1:])), parts

    return v.differentiate(loss)
