"""Max-pooling whose gradient is fast on CPU and defined at ties.

The gradient goes to the first maximum of a window in row-major order, as in the
frameworks whose published networks are rebuilt here; after a ReLU ties at zero are
common. XLA's own gradient of a windowed maximum is a select-and-scatter, 8 to 40
times slower on a CPU than the comparisons with a stored index used here.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxkd.layers import rules
from jaxkd.numerics import along_axis, take_constant


def max_pool(
    x: Float[Array, "*lead h w c"], *, window: int, stride: int, padding: int = 0
) -> Float[Array, "*lead new_h new_w c"]:
    """Maximum over square windows, `floor((n + 2 * padding - window) / stride) + 1`.

    The maximum over a square is taken along the rows and then over the row maxima,
    which keeps the row-major order among ties and needs `2 * window` comparisons.

    Args:
      x: maps `[..., h, w, c]`.
      window: side of the windows in pixels.
      stride: distance between windows.
      padding: pixels of minus infinity on every side, at most half a window.

    Returns:
      Maps `[..., height, width, c]` in the dtype of `x`.

    Raises:
      ValueError: padding above half a window, or maps smaller than one window.

    >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> max_pool(x, window=2, stride=2)[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    if not 0 <= padding <= window // 2:
        raise ValueError(
            f"padding must be 0 to {window // 2} (half a window), got {padding}"
        )
    if min(x.shape[-3:-1]) + 2 * padding < window:
        raise ValueError(
            f"maps of {x.shape[-3]}x{x.shape[-2]} are smaller than a window of {window}"
        )
    x = _max_pool_axis(x, -2, window, stride, padding)
    x = _max_pool_axis(x, -3, window, stride, padding)
    rules.tell("max_pool", window=window, shape=x.shape)
    return x


def _forward(
    x: jax.Array, axis: int, window: int, stride: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    """The maxima along an axis and the offset of each within its window, int8."""
    length = x.shape[axis]
    starts = np.arange((length + 2 * padding - window) // stride + 1) * stride - padding
    # A padded window repeats an edge pixel that it holds already: no infinities.
    pixels = np.clip(starts[:, None] + np.arange(window), 0, length - 1)
    offsets = (pixels - starts[:, None]).astype(np.int8)
    values = [take_constant(x, pixels[:, i], axis) for i in range(window)]
    maximum = functools.reduce(jnp.maximum, values)
    first = jnp.zeros(maximum.shape, jnp.int8)
    for i in reversed(range(window)):
        here = values[i] == maximum
        first = jnp.where(here, along_axis(offsets[:, i], axis, x), first)
    return maximum, first


def _maxima(
    x: jax.Array, axis: int, window: int, stride: int, padding: int
) -> jax.Array:
    return _forward(x, axis, window, stride, padding)[0]


def _max_pool_axis_forward(
    x: jax.Array, axis: int, window: int, stride: int, padding: int
) -> tuple[jax.Array, tuple[jax.Array, int]]:
    maximum, first = _forward(x, axis, window, stride, padding)
    return maximum, (first, x.shape[axis])


def _max_pool_axis_backward(
    axis: int,
    window: int,
    stride: int,
    padding: int,
    residual: tuple[jax.Array, int],
    cotangent: jax.Array,
) -> tuple[jax.Array]:
    first, length = residual
    windows = cotangent.shape[axis]
    pixel = np.arange(length) + padding
    total = jnp.zeros((), cotangent.dtype)
    for back in range(-(-window // stride)):  # a pixel is in at most so many windows
        index = pixel // stride - back
        offset = pixel - index * stride
        inside = (index >= 0) & (index < windows) & (offset < window)
        index = np.clip(index, 0, windows - 1)
        offset = np.where(inside, offset, -1).astype(np.int8)
        chosen = take_constant(first, index, axis) == along_axis(offset, axis, first)
        total = total + jnp.where(chosen, take_constant(cotangent, index, axis), 0)
    return (total,)


_max_pool_axis = jax.custom_vjp(_maxima, nondiff_argnums=(1, 2, 3, 4))
_max_pool_axis.defvjp(_max_pool_axis_forward, _max_pool_axis_backward)
