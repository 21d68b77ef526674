"""Adapters of the vectors of losses between logits."""

import jax.numpy as jnp

from jaxkd import distill, losses
from jaxkd.layers import Outputs


def distill_kd(v):
    method = distill.weighted(
        {"ce": v.hp("ce_weight"), "kd": v.hp("kd_weight")},
        kd={"temperature": v.hp("temperature")},
    )
    return v.differentiate(lambda x: _apply(v, method, x))


def distill_kd_torchdistill(v):
    alpha, temperature = v.hp("alpha"), v.hp("temperature")
    # Without cross-entropy that code also leaves out the factor T^2.
    soft = 1.0 - alpha if alpha else temperature**-2
    method = distill.weighted(
        {"ce": alpha, "kd": soft}, kd={"temperature": temperature}
    )
    return v.differentiate(lambda x: _apply(v, method, x)[0])


def distill_kd_crossentropy(v):
    alpha, temperature = v.hp("alpha"), v.hp("temp")

    def loss(x):
        values = losses.kd_cross_entropy(
            x["in_logits_s"], x["in_logits_t"], temperature=temperature
        )
        return alpha * jnp.mean(values), {"ori_weight": 1.0 - alpha}

    return v.differentiate(loss)


def _apply(v, method, x):
    return v.apply(
        method,
        student=Outputs(logits=x["in_logits_s"], taps={}),
        teachers=(Outputs(logits=x["in_logits_t"], taps={}),),
        batch={"label": x["in_labels"]},
    )
