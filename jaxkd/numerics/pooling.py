"""Average pooling to a given size, for maps whose sizes divide or do not."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def adaptive_average_pool(
    x: Float[Array, "*lead h w c"], size: int | Sequence[int]
) -> Float[Array, "*lead new_h new_w c"]:
    """Averages maps over a grid of `size` cells that cover them.

    Cell `i` of `m` averages the pixels from `floor(i * n / m)` up to, not including,
    `ceil((i + 1) * n / m)`. Cells share pixels where `m` does not divide `n`; where
    `m` exceeds `n`, pixels are repeated or averaged with their neighbour.

    Args:
      x: maps `[..., h, w, c]`; averaged in float32 if narrower.
      size: cells `(rows, columns)`, or one number for both.

    Returns:
      Maps `[..., rows, columns, c]` in the dtype of `x`.

    Raises:
      ValueError: a size below 1.

    >>> row = jnp.arange(5.0).reshape(1, 5, 1)
    >>> adaptive_average_pool(row, (1, 2))[0, :, 0].tolist()
    [1.0, 3.0]
    """
    rows, columns = (size, size) if isinstance(size, int) else tuple(size)
    if min(rows, columns) < 1:
        raise ValueError(f"size must be one or two integers above 0, got {size}")
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = _average(y, -3, rows)
    y = _average(y, -2, columns)
    return y.astype(x.dtype)


def _average(x: jax.Array, axis: int, cells: int) -> jax.Array:
    axis += x.ndim
    length = x.shape[axis]
    if length == cells:
        return x
    if length % cells == 0:
        shape = (*x.shape[:axis], cells, length // cells, *x.shape[axis + 1 :])
        return jnp.mean(x.reshape(shape), axis + 1)
    matrix = jnp.asarray(_cell_matrix(length, cells), x.dtype)
    y = jnp.tensordot(x, matrix, (axis, 1), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(y, -1, axis)


def _cell_matrix(length: int, cells: int) -> np.ndarray:
    """`[cells, length]`: row `i` has the weights of cell `i`."""
    index = np.arange(cells)[:, None]
    first = index * length // cells
    last = -(-(index + 1) * length // cells)
    pixel = np.arange(length)[None]
    return ((first <= pixel) & (pixel < last)) / (last - first)
