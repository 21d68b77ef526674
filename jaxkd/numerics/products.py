"""Matrix products of narrow operands with a float32 result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def product_in_float32(
    x: Float[Array, "*lead c"], kernel: Float[Array, "c k"]
) -> Float32[Array, "*lead k"]:
    """`x @ kernel`, the kernel rounded to the dtype of `x`, summed up in float32.

    The last layer of a dense prediction and projections of feature maps: operands are
    as narrow as the network computes, the result is not rounded. Backward as well: the
    cotangent is rounded to the dtype of `x`, while the products that automatic
    differentiation makes would widen `x` as a whole. Not for forward mode.

    Args:
      x: features.
      kernel: of any float dtype.

    Returns:
      The product, float32.

    >>> x, kernel = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 1))
    >>> product_in_float32(x, kernel).tolist()
    [[3.0], [3.0]]
    """
    return _product(x, kernel)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum(
        "...c,ck->...k",
        x,
        kernel.astype(x.dtype),
        preferred_element_type=jnp.float32,
    )


def _forward(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, kernel), (x, kernel)


def _backward(
    residual: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residual
    g = cotangent.astype(x.dtype)
    d_x = jnp.einsum("...k,ck->...c", g, kernel.astype(x.dtype))
    d_kernel = jnp.einsum("...c,...k->ck", x, g, preferred_element_type=jnp.float32)
    return d_x, d_kernel.astype(kernel.dtype)


_product.defvjp(_forward, _backward)
