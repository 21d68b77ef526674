"""Adapters of MEAL, MEAL V2 and FKD's stored labels."""

import re

import jax
import jax.numpy as jnp

from jaxkd import distill, losses
from jaxkd.layers import Outputs
from jaxkd.numerics import compress_labels, recover_labels


def distill_meal_v2(v):
    teachers = v.keys(r"in_logits_t\d+")
    assert len(teachers) == v.hp("teachers")
    method = distill.create("meal_v2", reduction=v.hp("K"))

    def loss(x):
        total, means = v.apply(
            method,
            student=Outputs(logits=x["in_logits_s"], taps={}),
            teachers=tuple(Outputs(logits=x[key], taps={}) for key in teachers),
            state=lambda params, memory: ({"discriminator": _dense(v, x)}, memory),
        )
        mean = losses.mean_logits([x[key] for key in teachers])
        layers = [(p["kernel"], p["bias"]) for p in _dense(v, x).values()]
        rows = jnp.concatenate([x["in_logits_s"], mean])
        return total, {
            "similarity": means["similarity"],
            "discriminator": means["discriminator"],
            "d_output": losses.discriminate(rows, layers),
        }

    return v.differentiate(loss)


def distill_meal_v1(v):
    count = len(v.keys(r"in_s\d+"))
    taps = [f"stage{i}" for i in range(1, count)]
    method = distill.create(
        "meal",
        gamma=tuple(v.hp("gamma")),
        eta=tuple(v.hp("eta")),
        similarity=v.hp("kind"),
        reduction=v.hp("K"),
    )

    def network(x, side):
        values = [x[f"in_{side}{i}"] for i in range(count)]
        return Outputs(
            logits=values[-1], taps=dict(zip(taps, values[:-1], strict=True))
        )

    def loss(x):
        discriminators = {
            name: _dense(v, x, f"d{i}_") for i, name in enumerate([*taps, "logits"])
        }
        return v.apply(
            method,
            student=network(x, "s"),
            teachers=(network(x, "t"),),
            state=lambda params, memory: ({"discriminator": discriminators}, memory),
        )

    return v.differentiate(loss)


def _dense(v, x, prefix=""):
    """Stored 1x1 convolutions as the layers of a discriminator."""
    kernels = v.keys(rf"w_{prefix}conv\d+_kernel")
    return {
        f"dense{i}": {
            "kernel": x[key],
            "bias": x[key.removesuffix("kernel") + "bias"],
        }
        for i, key in enumerate(kernels)
    }


def distill_fkd(v):
    classes = v.hp("num_classes")
    formats = [key.removeprefix("out_loss_") for key in v.keys(r"out_loss_.+")]
    method = distill.create(
        "fkd",
        labels="teacher",
        label_format="marginal_smoothing_k5",
        temperature=v.hp("temp"),
    )

    def loss(x):
        student, teacher = x["in_logits_s"], x["in_logits_t"]
        parts = {}
        for name in formats:
            index, probability = compress_labels(
                jax.nn.softmax(teacher), label_format=name
            )
            dense = recover_labels(
                index, probability, label_format=name, num_classes=classes
            )
            stored = jnp.stack([index.astype(jnp.float32), probability], axis=1)
            if name == "hard":
                parts["stored_hard"] = index[:, 0]
            else:
                kept = stored if re.search("marginal", name) else stored[:, :, 0]
                parts[f"stored_{name}"] = kept
            parts[f"recovered_{name}"] = dense
            values = losses.soft_cross_entropy(student, dense, temperature=v.hp("temp"))
            parts[f"loss_{name}"] = jnp.mean(values)
        total, _ = v.apply(
            method,
            student=Outputs(logits=student, taps={}),
            teachers=(Outputs(logits=teacher, taps={}),),
        )
        return total, parts

    return v.differentiate(loss)
