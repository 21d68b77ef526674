"""Unit vectors with the gradient of their formula, also at zero.

`jaxkd.numerics.l2_normalize` has the same values, but gives a vector of zeros a zero
gradient. The formula's own gradient there is `g / eps`: huge, and what the published
code computes. After a ReLU it is harmless, as the ReLU's gradient at zero is zero.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def unit_vectors(
    x: Float[Array, "*lead c"], *, eps: float = 1e-12
) -> Float32[Array, "*lead c"]:
    """Divides vectors by their norm, `x / max(||x||, eps)`, in float32.

    Args:
      x: vectors along the last axis, with entries below 1e18.
      eps: lower bound of the norm.

    >>> print(unit_vectors(jnp.array([0.0, 2.0, 0.0])))
    [0. 1. 0.]
    """
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    positive = squares > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)
    return x / jnp.maximum(norm, eps)
