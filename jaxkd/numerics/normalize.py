"""Normalisation of vectors that stays finite everywhere.

`x / max(||x||, eps)` is the form deep-learning frameworks share. Written naively its
gradient is NaN at zero and its square overflows float32 above 1e19; neither happens
here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def l2_normalize(
    x: Float[Array, "..."], axis: int | tuple[int, ...] = -1, eps: float = 1e-12
) -> Float[Array, "..."]:
    """Divides `x` by its Euclidean norm: `x / max(||x||, eps)`.

    A vector of zeros gives zeros, and gets a zero gradient.

    Args:
      x: array of any shape; computed in float32 if its type is narrower.
      axis: axis or axes that form one vector.
      eps: lower bound of the norm.

    Returns:
      Array of the shape and dtype of `x`.

    >>> l2_normalize(jnp.array([3.0, 4.0])).tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # Scaling by the largest entry keeps the squares in range: x^4 attention maps of
    # unnormalised features reach 1e20, whose square is no float32.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(wide), axis, keepdims=True))
    nonzero = largest > 0
    scale = jnp.where(nonzero, largest, 1.0)
    scaled = wide / scale
    squares = jnp.sum(jnp.square(scaled), axis, keepdims=True)
    norm = jnp.sqrt(jnp.where(nonzero, squares, 1.0))
    unit = jnp.where(nonzero, scaled / jnp.maximum(norm, eps / scale), 0.0)
    return unit.astype(x.dtype)
