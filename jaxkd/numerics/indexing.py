"""Gathers with constant indices, the way resizing and pooling use them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def take_constant(x: jax.Array, index: np.ndarray, axis: int) -> jax.Array:
    """`x` at constant positions of an axis; they must be in range.

    `jnp.take` by default fills positions out of range with NaN, which costs a select.
    """
    return jnp.take(x, index, axis=axis, mode="clip")


def along_axis(values: np.ndarray, axis: int, like: jax.Array) -> np.ndarray:
    """Shapes a vector so that it broadcasts against `like` along `axis` only."""
    shape = [1] * like.ndim
    shape[axis] = len(values)
    return values.reshape(shape)
