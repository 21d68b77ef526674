"""Initialisers under the names by which the reference networks know them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax.linen import initializers
from flax.typing import Initializer

kaiming_normal: Initializer = initializers.variance_scaling(2.0, "fan_out", "normal")
"""Normal with variance `2 / (k * k * out_channels)` (He et al., 2015)."""

fan_in_uniform: Initializer = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform within `1 / sqrt(fan_in)`: the default for kernels in PyTorch."""


def bias_uniform(fan_in: int) -> Initializer:
    """Uniform within `1 / sqrt(fan_in)` of the kernel: PyTorch's default for biases."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
