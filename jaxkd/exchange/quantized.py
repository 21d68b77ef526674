"""Gradients averaged in few bits, with error feedback.

Two rounds, as a reduce-scatter and a gather: each device sends every other its part of
the tensor as integers, sums the parts that it gets, and sends the mean, again as
integers, to all. Rounding follows Alistarh, Grubic, Li, Tomioka and Vojnovic, QSGD:
Communication-Efficient SGD via Gradient Quantization and Encoding, NeurIPS 2017, with
the largest magnitude as the scale and without its entropy code; what rounding leaves is
kept for the next step (Seide et al., 1-Bit Stochastic Gradient Descent, 2014).
"""

from __future__ import annotations

from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from jaxkd.exchange.base import (
    Exchange,
    by_path,
    in_tree,
    register,
    when_finite,
    world_size,
)


@flax.struct.dataclass
class QuantizedState:
    """What one device remembers of tensors with two axes or more, by path.

    Attributes:
      error: what the first round left, in the shape of the tensor.
      part_error: what the second round left of this device's part of the mean.
    """

    error: Any
    part_error: Any


@register("quantized")
def quantized(
    *,
    bits: int = 8,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    devices: int,
    axis: str = "data",
) -> Exchange:
    """The mean of gradients in `bits` bits per number.

    A number `x` is sent as the integer next to `x (2^(bits - 1) - 1) / max|x|`, beside
    one float32 scale per tensor, device and round. Up to 4 bits, two of them share a
    byte. Tensors with fewer than two axes are averaged whole.

    Args:
      bits: 2 to 8.
      rounding: to the nearest integer, or up and down by chance, so that the mean over
        many draws is right without error feedback.
      devices: how many exchange.
      axis: the devices.

    Raises:
      ValueError: an impossible option.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, got {bits}")
    if devices < 1:
        raise ValueError(f"devices must be >= 1, got {devices}")

    def init(params: Any) -> QuantizedState:
        arrays = {p: x for p, x in by_path(params).items() if x.ndim > 1}
        if not arrays:
            raise ValueError("no parameter has two axes or more, which are quantised")
        return QuantizedState(
            error={p: jnp.zeros_like(x) for p, x in arrays.items()},
            part_error={
                p: jnp.zeros(part_size(x.size, devices), x.dtype)
                for p, x in arrays.items()
            },
        )

    def code(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise = None if rounding == "nearest" else jax.random.uniform(key, x.shape)
        return quantize(x, bits=bits, noise=noise)

    def packed(codes: jax.Array) -> jax.Array:
        return pack_halves(codes) if bits <= 4 else codes

    def unpacked(sent: jax.Array) -> jax.Array:
        return unpack_halves(sent) if bits <= 4 else sent

    def one(
        g: jax.Array, error: jax.Array, part_error: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        first, second = jax.random.split(key)
        part = part_error.size
        total = g + error
        flat = jnp.pad(total.reshape(-1), (0, devices * part - total.size))
        codes, scale = code(flat, first)
        error = total - (codes * scale)[: total.size].reshape(total.shape)
        # Row i of what comes back is this device's part as device i sent it.
        sent = packed(codes.reshape(devices, part))
        parts = unpacked(jax.lax.all_to_all(sent, axis, 0, 0, tiled=True))
        scales = jax.lax.all_gather(scale, axis)
        mean = jnp.sum(parts * scales[:, None], axis=0) / devices + part_error
        codes, scale = code(mean, second)
        part_error = mean - codes * scale
        means = unpacked(jax.lax.all_gather(packed(codes), axis))
        scales = jax.lax.all_gather(scale, axis)
        flat = (means * scales[:, None]).reshape(-1)[: g.size]
        return flat.reshape(g.shape).astype(g.dtype), error, part_error

    def update(
        gradients: Any, state: QuantizedState, *, step: Any, key: Any
    ) -> tuple[Any, QuantizedState]:
        del step
        if world_size(axis) != devices:
            raise ValueError(f"devices is {devices}, but {world_size(axis)} exchange")
        results, error, part_error = {}, dict(state.error), dict(state.part_error)
        for i, (path, g) in enumerate(by_path(gradients).items()):
            if path in error:
                results[path], error[path], part_error[path] = one(
                    g, error[path], part_error[path], jax.random.fold_in(key, i)
                )
            else:
                results[path] = jax.lax.pmean(g, axis)
        state = QuantizedState(error=error, part_error=part_error)
        return in_tree(results, gradients), state

    return Exchange(init=init, update=when_finite(update, axis))


def part_size(size: int, devices: int) -> int:
    """Numbers in one device's part of a tensor: even, so that halves make bytes."""
    part = -(-size // devices)
    return part + part % 2


def quantize(
    x: jax.Array, *, bits: int, noise: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Integers next to `x / scale`, and the scale `max|x| / (2^(bits - 1) - 1)`.

    Args:
      x: of any shape.
      bits: of each integer, its sign included.
      noise: uniform in [0, 1), in the shape of `x`: then numbers are rounded up or down
        by chance. None rounds to the nearest, halves to the even one.

    Returns:
      int8 in the shape of `x`, and the scale in its dtype.
    """
    levels = 2 ** (bits - 1) - 1
    scale = jnp.max(jnp.abs(x)) / levels
    ratio = x / jnp.where(scale == 0, 1, scale)
    rounded = jnp.round(ratio) if noise is None else jnp.floor(ratio + noise)
    # The largest number over its own scale may be a rounding error above the last.
    return jnp.clip(rounded, -levels, levels).astype(jnp.int8), scale


def pack_halves(codes: jax.Array) -> jax.Array:
    """Two integers from -8 to 7 per byte, along the last axis, which must be even."""
    low, high = codes[..., 0::2], codes[..., 1::2]
    return (low & 0xF).astype(jnp.uint8) | (high.astype(jnp.uint8) << 4)


def unpack_halves(packed: jax.Array) -> jax.Array:
    """The integers of `pack_halves`, int8."""
    low, high = packed & 0xF, packed >> 4
    both = jnp.stack([low, high], axis=-1).reshape(*packed.shape[:-1], -1)
    both = both.astype(jnp.int8)
    return jnp.where(both > 7, both - 16, both)
