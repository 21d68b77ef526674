"""1x1 projections that HLFD and its baselines put between two prediction maps.

The published code builds a new random convolution inside the loss at every call and
never trains it. Three kinds are offered: that behaviour, one draw kept for the whole
run, and a projection trained with the student.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from jaxkd.distill.method import Memory, Params

Projection = Literal["resample", "fixed", "learned"]
Widths = Mapping[str, tuple[int, int]]
Projections = dict[str, dict[str, jax.Array]]


def sample(key: jax.Array, widths: Widths) -> Projections:
    """Draws projections from U(-1/sqrt(in), 1/sqrt(in)), kernel and bias alike.

    Args:
      key: random key; each projection gets its own.
      widths: input and output channels by name.

    Returns:
      `{"kernel": [in, out], "bias": [out]}`, float32, by name.
    """
    projections = {}
    for i, (name, (channels, width)) in enumerate(widths.items()):
        kernel_key, bias_key = jax.random.split(jax.random.fold_in(key, i))
        limit = channels**-0.5
        projections[name] = {
            "kernel": _uniform(kernel_key, (channels, width), limit),
            "bias": _uniform(bias_key, (width,), limit),
        }
    return projections


def init(kind: Projection, key: jax.Array, widths: Widths) -> tuple[Params, Memory]:
    """What a kind of projection trains and remembers.

    Returns:
      `(params, memory)`: the projections are in `params` if learned, in `memory` if
      fixed, in neither if drawn anew at each step.
    """
    if kind == "learned":
        return sample(key, widths), {}
    if kind == "fixed":
        return {}, sample(key, widths)
    return {}, {}


def current(
    kind: Projection, params: Params, memory: Memory, key: jax.Array, widths: Widths
) -> Projections:
    """The projections of this step."""
    if kind == "learned":
        return params
    if kind == "fixed":
        return memory
    return sample(key, widths)


def _uniform(key: jax.Array, shape: tuple[int, ...], limit: float) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit)
