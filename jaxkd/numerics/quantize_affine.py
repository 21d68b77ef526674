"""Affine quantisation of a tensor to at most eight bits, with its own scale.

The scale and zero point come from the tensor's own extremes, so that a receiver needs
nothing but the integers and these two numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8


class AffineQuantized(NamedTuple):
    """Integers and what turns them back: `scale * (values - zero_point)`.

    Attributes:
      values: uint8, in the shape of the tensor.
      scale: float32, one number, or `[batch]`.
      zero_point: int32, likewise.
    """

    values: UInt8[Array, "..."]
    scale: Float32[Array, "..."]
    zero_point: Int32[Array, "..."]


def affine_quantize(
    x: Float[Array, "b ..."], *, bits: int = 8, per_sample: bool = True
) -> AffineQuantized:
    """Rounds a tensor to integers of `bits` bits.

        scale = (max x - min x) / (2^bits - 1)
        zero_point = trunc(clip(-min x / scale, 0, 2^bits - 1))
        values = round_half_even(clip(zero_point + x / scale, 0, 2^bits - 1))

    A tensor whose entries all equal `c` would have a scale of zero; it becomes zeros
    with scale `c` and zero point -1, which give back `c` exactly. A tensor that does
    not reach down (or up) to zero is clipped: the zero point cannot leave the range.

    Args:
      x: `[batch, ...]`, finite.
      bits: 1 to 8.
      per_sample: whether every example has its own scale and zero point. Otherwise the
        tensor has one, as in the published code, and examples depend on each other.

    Returns:
      The integers, the scale and the zero point.

    Raises:
      ValueError: `bits` is outside 1 to 8.

    >>> q = affine_quantize(jnp.array([[-1.0, 0.0, 4.1]]))
    >>> q.values.tolist(), q.zero_point.tolist()
    ([[0, 50, 255]], [50])
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    largest = float(2**bits - 1)
    wide = x.astype(jnp.float32)
    axes = tuple(range(1 if per_sample else 0, x.ndim))
    low = jnp.min(wide, axes)
    scale = (jnp.max(wide, axes) - low) / largest
    constant = scale < jnp.finfo(jnp.float32).tiny
    safe = jnp.where(constant, 1.0, scale)
    zero_point = jnp.clip(-low / safe, 0.0, largest).astype(jnp.int32)
    shift = _like(zero_point, wide).astype(jnp.float32)
    values = jnp.round(jnp.clip(shift + wide / _like(safe, wide), 0.0, largest))
    return AffineQuantized(
        values=jnp.where(_like(constant, wide), 0.0, values).astype(jnp.uint8),
        scale=jnp.where(constant, low, scale),
        zero_point=jnp.where(constant, -1, zero_point),
    )


def affine_dequantize(quantized: AffineQuantized) -> Float32[Array, "..."]:
    """The tensor that a receiver sees: `scale * (values - zero_point)`.

    Args:
      quantized: what `affine_quantize` returned.

    Returns:
      float32 in the shape of the integers.
    """
    values = quantized.values.astype(jnp.int32)
    steps = values - _like(quantized.zero_point, values)
    return _like(quantized.scale, values) * steps.astype(jnp.float32)


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Shapes `[batch]` or `[]` so that it broadcasts against `x` without promotion."""
    return vector.reshape(vector.shape + (1,) * (x.ndim - vector.ndim))
