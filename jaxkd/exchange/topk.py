"""Deep Gradient Compression: send the largest numbers, keep the others for later.

Lin, Han, Mao, Wang and Dally, Deep Gradient Compression: Reducing the Communication
Bandwidth for Distributed Training, ICLR 2018; details follow the authors' code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from jaxkd.exchange.base import (
    Arrays,
    Exchange,
    by_path,
    in_tree,
    register,
    when_finite,
    world_size,
)

# A threshold estimated from a sample may let pass a share of the wanted numbers
# between these; outside them it is mended.
_TOO_FEW, _TOO_MANY = 0.8, 1.3
_ROUNDS = 10
_LARGEST_HALF = 65504.0


@flax.struct.dataclass
class DgcState:
    """What one device remembers.

    Attributes:
      momentum: of every parameter, by path.
      unsent: what has gathered and was not sent yet, of parameters with two axes or
        more, by path.
    """

    momentum: Any
    unsent: Any


@register("dgc")
def dgc(
    *,
    ratio: float = 0.001,
    momentum: float = 0.9,
    nesterov: bool = False,
    momentum_masking: bool = True,
    warmup_epochs: int = 0,
    warmup_ratios: tuple[float, ...] = (),
    steps_per_epoch: int = 1,
    clip_norm: float | None = None,
    clip: Literal["global", "tensor"] = "global",
    selection: Literal["exact", "sampled"] = "exact",
    sample_ratio: float = 0.01,
    values: Literal["float32", "float16"] = "float32",
    axis: str = "data",
) -> Exchange:
    """Deep Gradient Compression.

    Each device gathers its own gradients with momentum correction, `m = mu m + g`,
    `v = v + m` (Nesterov: `m = mu (m + g)`, `v = v + m + g`), sends the
    `ceil(ratio * size)` largest `|v|` of every tensor with their places, and forgets
    `v` (and `m`: momentum factor masking) there. The result is the sum of what was sent
    over the number of devices; the optimiser applies it without momentum of its own.
    Tensors with fewer than two axes, and all tensors where the ratio is 1, are
    averaged whole, and the momentum comes after.

    Every device sends `ceil(ratio * size)` values and as many int32 places per tensor,
    so that with n devices it pays below a ratio of about `1 / n` only.

    Args:
      ratio: the share that is sent; above 1 it means one in so many.
      momentum: `mu`.
      nesterov: the form of the momentum.
      momentum_masking: whether momentum is forgotten where values are sent.
      warmup_epochs: epochs before the ratio is reached (see `warmup`).
      warmup_ratios: the ratio of each epoch of the warm-up, in place of `warmup`.
      steps_per_epoch: to tell the epoch from the step.
      clip_norm: bound of the norm of a device's own gradient; None for none.
      clip: whether the bound is for all parameters together or for each.
      selection: "exact" finds the largest by sorting; "sampled" those above a
        threshold that a sample of the numbers tells.
      sample_ratio: the share in that sample, at least.
      values: type of the values that are sent. What float16 cuts off is lost.
      axis: the devices.

    Raises:
      ValueError: an impossible option.
    """
    if ratio <= 0 or not math.isfinite(ratio):
        raise ValueError(f"ratio must be > 0 and finite, got {ratio}")
    ratio = 1.0 / ratio if ratio > 1 else ratio
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"clip_norm must be > 0 and finite, got {clip_norm}")
    if not 0 < sample_ratio <= 1:
        raise ValueError(f"sample_ratio must be in (0, 1], got {sample_ratio}")
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch must be >= 1, got {steps_per_epoch}")
    if warmup_epochs and warmup_ratios:
        raise ValueError("warmup_epochs and warmup_ratios exclude each other")
    ratios = [*(warmup_ratios or warmup(ratio, warmup_epochs)), ratio]
    if not all(0 < r <= 1 for r in ratios):
        raise ValueError(f"warmup_ratios must be in (0, 1], got {warmup_ratios}")

    def init(params: Any) -> DgcState:
        arrays = by_path(params)
        unsent = {p: jnp.zeros_like(x) for p, x in arrays.items() if x.ndim > 1}
        if not unsent:
            raise ValueError("no parameter has two axes or more, which dgc compresses")
        return DgcState(
            momentum={p: jnp.zeros_like(x) for p, x in arrays.items()}, unsent=unsent
        )

    def send(
        ratio: float, gradients: Arrays, state: DgcState, key: jax.Array
    ) -> tuple[Arrays, DgcState]:
        results, momenta, unsent = {}, dict(state.momentum), dict(state.unsent)
        for i, (path, g) in enumerate(gradients.items()):
            m = momenta[path]
            if path not in unsent or ratio == 1:
                zero = jnp.zeros_like(g)
                mean = jax.lax.pmean(g, axis)
                momenta[path], results[path] = correct(
                    mean, m, zero, momentum=momentum, nesterov=nesterov
                )
                continue
            m, v = correct(g, m, unsent[path], momentum=momentum, nesterov=nesterov)
            if selection == "exact":
                places, sent = largest(v, ratio=ratio)
            else:
                places, sent = above_threshold(
                    v,
                    ratio=ratio,
                    sample_ratio=sample_ratio,
                    key=jax.random.fold_in(key, i),
                )
            unsent[path] = _forget(v, places)
            momenta[path] = _forget(m, places) if momentum_masking else m
            results[path] = _gathered(places, sent, g, values, axis)
        return results, DgcState(momentum=momenta, unsent=unsent)

    branches = [functools.partial(send, r) for r in ratios]

    def update(
        gradients: Any, state: DgcState, *, step: Any, key: Any
    ) -> tuple[Any, DgcState]:
        arrays = by_path(gradients)
        if clip_norm is not None:
            arrays = clipped(arrays, clip_norm, each=clip == "tensor")
        if len(branches) == 1:
            results, state = branches[0](arrays, state, key)
        else:
            epoch = jnp.minimum(step // steps_per_epoch, len(branches) - 1)
            results, state = jax.lax.switch(epoch, branches, arrays, state, key)
        return in_tree(results, gradients), state

    return Exchange(init=init, update=when_finite(update, axis), has_momentum=True)


def warmup(ratio: float, epochs: int) -> list[float]:
    """The ratios of a warm-up: `max(ratio ** ((e + 1) / (epochs + 1)), ratio)`.

    Args:
      ratio: after the warm-up.
      epochs: of the warm-up.

    >>> [round(r, 4) for r in warmup(0.001, 5)]
    [0.3162, 0.1, 0.0316, 0.01, 0.0032]
    """
    if epochs < 0:
        raise ValueError(f"warmup_epochs must be >= 0, got {epochs}")
    return [max(ratio ** ((e + 1) / (epochs + 1)), ratio) for e in range(epochs)]


def correct(
    gradient: jax.Array,
    momentum_before: jax.Array,
    unsent: jax.Array,
    *,
    momentum: float,
    nesterov: bool,
) -> tuple[jax.Array, jax.Array]:
    """Momentum correction of one tensor: its momentum, and what it has to send.

    Args:
      gradient: of this step.
      momentum_before: after the step before, in its shape.
      unsent: what has gathered, in its shape.
      momentum: the factor.
      nesterov: the form.
    """
    if nesterov:
        m = momentum * (momentum_before + gradient)
        return m, unsent + (m + gradient)
    m = momentum * momentum_before + gradient
    return m, unsent + m


def clipped(arrays: Arrays, bound: float, *, each: bool) -> Arrays:
    """Gradients whose norm, of each or of all together, is at most `bound`."""
    squares = {p: jnp.sum(jnp.square(x)) for p, x in arrays.items()}
    total = sum(squares.values(), start=jnp.zeros(()))

    def one(path: str, x: jax.Array) -> jax.Array:
        norm = jnp.sqrt(squares[path] if each else total)
        return x * jnp.where(norm > bound, bound / norm, 1.0).astype(x.dtype)

    return {path: one(path, x) for path, x in arrays.items()}


def count_sent(size: int, ratio: float) -> int:
    """How many numbers of a tensor are sent: `ceil(ratio * size)`, at least one."""
    return max(math.ceil(ratio * size), 1)


def largest(tensor: jax.Array, *, ratio: float) -> tuple[jax.Array, jax.Array]:
    """Places and values of the numbers largest in magnitude, of ties the first.

    Args:
      tensor: of any shape.
      ratio: the share that is taken.

    Returns:
      Places in the flat tensor, int32, rising; and the values there.
    """
    flat = tensor.reshape(-1)
    _, places = jax.lax.top_k(jnp.abs(flat), count_sent(flat.size, ratio))
    places = jnp.sort(places).astype(jnp.int32)
    return places, flat[places]


def sample_sizes(size: int, *, ratio: float, sample_ratio: float) -> tuple[int, int]:
    """Stride and number of the numbers that are sampled: an odd stride, or all.

    Args:
      size: of the tensor.
      ratio: the share that is sent; two of them are in the sample, at least.
      sample_ratio: the share that is sampled, at least.
    """
    wanted = max(math.ceil(size * sample_ratio), math.ceil(2 / ratio))
    if wanted >= size:
        return 1, size
    stride = math.ceil(size / wanted / 32) * 32 + 1
    while size // stride < wanted and stride > 8:
        stride -= 8
    return stride, size // stride


def above_threshold(
    tensor: jax.Array, *, ratio: float, sample_ratio: float, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Places and values of numbers above a threshold that a sample tells.

    The threshold is the magnitude that the share `ratio` of a strided sample reaches.
    Where it lets pass fewer than 0.8 of the wanted numbers it is lowered by a fifth, up
    to ten times; where more than 1.3, the largest are taken exactly.

    Args:
      tensor: of any shape.
      ratio: the share that is wanted.
      sample_ratio: the share of the sample.
      key: tells where the sample begins.

    Returns:
      As of `largest`, as many; where fewer pass, the rest has the place `tensor.size`
      and the value 0.
    """
    flat = tensor.reshape(-1)
    count = count_sent(flat.size, ratio)
    stride, samples = sample_sizes(flat.size, ratio=ratio, sample_ratio=sample_ratio)
    if samples == flat.size:
        return largest(tensor, ratio=ratio)
    size = jnp.abs(flat)
    start = jax.random.randint(key, (), 0, stride)
    sample = size[start + stride * jnp.arange(samples)]
    top, _ = jax.lax.top_k(sample, count_sent(samples, ratio))

    def lower(_: Any, threshold: jax.Array) -> jax.Array:
        few = jnp.sum(size >= threshold) < _TOO_FEW * count
        return jnp.where(few, _TOO_FEW * threshold, threshold)

    threshold = jax.lax.fori_loop(0, _ROUNDS, lower, top[-1])
    many = jnp.sum(size >= threshold) > _TOO_MANY * count

    def first() -> jax.Array:
        (found,) = jnp.nonzero(size >= threshold, size=count, fill_value=flat.size)
        return found.astype(jnp.int32)

    places = jax.lax.cond(many, lambda: largest(tensor, ratio=ratio)[0], first)
    return places, flat.at[places].get(mode="fill", fill_value=0)


def _forget(tensor: jax.Array, places: jax.Array) -> jax.Array:
    flat = tensor.reshape(-1).at[places].set(0, mode="drop")
    return flat.reshape(tensor.shape)


def _gathered(
    places: jax.Array, sent: jax.Array, like: jax.Array, dtype: str, axis: str
) -> jax.Array:
    """The mean over the devices of the numbers that they send."""
    if dtype == "float16":
        sent = jnp.clip(sent, -_LARGEST_HALF, _LARGEST_HALF).astype(jnp.float16)
    places = jax.lax.all_gather(places, axis, tiled=True)
    sent = jax.lax.all_gather(sent, axis, tiled=True).astype(like.dtype)
    total = jnp.zeros(like.size, like.dtype).at[places].add(sent, mode="drop")
    return (total / world_size(axis)).reshape(like.shape)


def bytes_gathered(
    sizes: Sequence[int], *, ratio: float, devices: int, value_bytes: int = 4
) -> int:
    """Bytes that all-gathers return in a step: of values, and of int32 places.

    Args:
      sizes: of the tensors with two axes or more.
      ratio: the share that is sent, below 1.
      devices: how many exchange.
      value_bytes: 4, or 2 for float16.
    """
    return devices * (value_bytes + 4) * sum(count_sent(s, ratio) for s in sizes)
