"""Adapters of the vectors of losses that belong to application networks."""

import jax
import jax.numpy as jnp

from jaxkd import losses


def arch_bce_dice(v):
    logits, target = v["logits"], v["target"]

    def loss(logits):
        return jnp.mean(losses.bce_dice(logits, target, smooth=1e-7))

    value, gradient = jax.value_and_grad(loss)(logits)
    v.tolerances["glogits"] = v.gradient_tolerance("glogits")
    return {
        "probs": jax.nn.sigmoid(logits),
        "bce": jnp.mean(losses.binary_bce(logits, target)),
        "dice_sq": 1.0 - losses.binary_dice(logits, target)[0],
        "loss_sq": value,
        "glogits": gradient,
        "dice_plain": 1.0 - losses.binary_dice(logits, target, denominator="plain")[0],
    }
