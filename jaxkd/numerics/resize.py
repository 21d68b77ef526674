"""Resizing of feature maps, with the sampling grids of deep-learning frameworks.

Both grids of bilinear interpolation occur in published code: `align_corners=True`
maps the outer pixel centres onto each other, `False` the outer pixel edges. Neither
smooths before shrinking. Along one axis a resize is a product with a constant matrix
of at most two non-zeros per row: forward it is a gather of two neighbours, backward a
sum over the few output pixels that read each input pixel. The scatter-add that
automatic differentiation would make of the gather is several times slower on a CPU.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxkd.numerics.indexing import along_axis, take_constant

# Above this many readers per input pixel a dense product beats the unrolled sum.
_MAX_UNROLLED = 40


def resize_bilinear(
    x: Float[Array, "*lead h w c"],
    size: Sequence[int],
    *,
    align_corners: bool = False,
) -> Float[Array, "*lead new_h new_w c"]:
    """Resizes maps by bilinear interpolation, never antialiased.

    Output pixel `i` of `m` reads position `i * (n - 1) / (m - 1)` of `n` if
    `align_corners`, else `max((i + 1/2) * n / m - 1/2, 0)`. Reverse-mode
    differentiable any number of times; forward mode is not defined.

    Args:
      x: maps `[..., h, w, c]`; interpolated in float32 if narrower.
      size: new `(height, width)`.
      align_corners: which grid, see the module docstring.

    Returns:
      Maps `[..., height, width, c]` in the dtype of `x`.

    Raises:
      ValueError: a size below 1.

    >>> row = jnp.array([[[0.0], [1.0]]])
    >>> resize_bilinear(row, (1, 4))[0, :, 0].tolist()
    [0.0, 0.25, 0.75, 1.0]
    >>> resize_bilinear(row, (1, 3), align_corners=True)[0, :, 0].tolist()
    [0.0, 0.5, 1.0]
    """
    height, width = _checked(size)
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = _resize_axis(y, -2, _linear_grid(x.shape[-2], width, align_corners))
    y = _resize_axis(y, -3, _linear_grid(x.shape[-3], height, align_corners))
    return y.astype(x.dtype)


def resize_nearest(
    x: Shaped[Array, "*lead h w c"], size: Sequence[int]
) -> Shaped[Array, "*lead new_h new_w c"]:
    """Resizes maps by copying pixels: output `i` of `m` is input `floor(i * n / m)`.

    Args:
      x: maps or masks `[..., h, w, c]` of any dtype.
      size: new `(height, width)`.

    Returns:
      Array `[..., height, width, c]` in the dtype of `x`.

    Raises:
      ValueError: a size below 1.
    """
    height, width = _checked(size)
    columns = _nearest_grid(x.shape[-2], width)
    rows = _nearest_grid(x.shape[-3], height)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return _interpolate(_interpolate(x, -2, columns), -3, rows)
    # Widened for the sums of the backward pass; exact, and free once fused.
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return _resize_axis(_resize_axis(y, -2, columns), -3, rows).astype(x.dtype)


def _checked(size: Sequence[int]) -> Sequence[int]:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be two integers above 0, got {tuple(size)}")
    return size


class _Grid:
    """Where the output pixels of one axis read, and who reads each input pixel.

    Compared by identity: grids are cached, so jit sees the same one every time.

    Attributes:
      low: `[m]` index of the first neighbour.
      high: `[m]` index of the second, or None if pixels are copied.
      fraction: `[m]` weight of the second neighbour.
      matrix: `[m, n]` the same as a matrix.
      readers: `[n, k]` consecutive outputs that cover all readers of each input.
      reader_weights: `[n, k]` their weights, zero for non-readers.
      is_identity: whether every output is the input at its own place.
    """

    def __init__(
        self,
        length: int,
        low: np.ndarray,
        high: np.ndarray | None = None,
        fraction: np.ndarray | None = None,
    ):
        new_length = len(low)
        self.low, self.high = low, high
        self.fraction = np.zeros(new_length) if fraction is None else fraction
        self.is_identity = np.array_equal(low, np.arange(length)) and (
            not self.fraction.any()
        )
        self.matrix = np.zeros((new_length, length))
        outputs = np.arange(new_length)
        np.add.at(self.matrix, (outputs, low), 1.0 - self.fraction)
        if high is not None:
            np.add.at(self.matrix, (outputs, high), self.fraction)
        nonzero = self.matrix != 0
        first = nonzero.argmax(0)
        last = new_length - 1 - nonzero[::-1].argmax(0)
        span = np.where(nonzero.any(0), last - first + 1, 1)
        count = int(span.max())
        start = np.minimum(first, new_length - count)
        self.readers = start[:, None] + np.arange(count)
        self.reader_weights = np.take_along_axis(self.matrix.T, self.readers, axis=1)


@functools.cache
def _linear_grid(length: int, new_length: int, align_corners: bool) -> _Grid:
    index = np.arange(new_length, dtype=np.float64)
    if align_corners:
        position = index * ((length - 1) / max(new_length - 1, 1))
    else:
        position = np.maximum((index + 0.5) * (length / new_length) - 0.5, 0.0)
    low = np.minimum(np.floor(position).astype(np.int64), length - 1)
    high = np.minimum(low + 1, length - 1)
    return _Grid(length, low, high, position - low)


@functools.cache
def _nearest_grid(length: int, new_length: int) -> _Grid:
    # The product is rounded to float32 as in the reference framework. For some sizes
    # (2 -> 82) a pixel then falls one to the left of the exact floor.
    scale = np.float32(length) / np.float32(new_length)
    position = np.arange(new_length, dtype=np.float32) * scale
    low = np.minimum(np.floor(position).astype(np.int64), length - 1)
    return _Grid(length, low)


def _interpolate(x: jax.Array, axis: int, grid: _Grid) -> jax.Array:
    if grid.is_identity:
        return x
    low = take_constant(x, grid.low, axis)
    if grid.high is None:
        return low
    fraction = along_axis(grid.fraction.astype(x.dtype), axis, x)
    return low * (1 - fraction) + take_constant(x, grid.high, axis) * fraction


def _sum_over_readers(g: jax.Array, axis: int, grid: _Grid) -> jax.Array:
    """Transposed interpolation as a sum of gathers, which XLA fuses into one loop."""
    terms = (
        take_constant(g, index, axis) * along_axis(weight.astype(g.dtype), axis, g)
        for index, weight in zip(grid.readers.T, grid.reader_weights.T, strict=True)
    )
    return functools.reduce(operator.add, terms)


def _matrix_product(matrix: np.ndarray, g: jax.Array, axis: int) -> jax.Array:
    """`matrix` applied along `axis`, all other axes kept.

    A batch of plain products: einsum would transpose the maps on a CPU.
    """
    axis += g.ndim
    rows = math.prod(g.shape[:axis])
    product = jax.lax.dot_general(
        jnp.broadcast_to(matrix.astype(g.dtype), (rows, *matrix.shape)),
        g.reshape(rows, g.shape[axis], math.prod(g.shape[axis + 1 :])),
        (((2,), (1,)), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST,
    )
    return product.reshape(*g.shape[:axis], len(matrix), *g.shape[axis + 1 :])


def _resize_axis_forward(
    x: jax.Array, axis: int, grid: _Grid
) -> tuple[jax.Array, None]:
    return _interpolate(x, axis, grid), None


def _resize_axis_backward(
    axis: int, grid: _Grid, residual: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    del residual
    if grid.is_identity:
        return (cotangent,)
    if grid.readers.shape[1] > _MAX_UNROLLED:
        return (_matrix_product(grid.matrix.T, cotangent, axis),)
    return (_sum_over_readers(cotangent, axis, grid),)


_resize_axis = jax.custom_vjp(_interpolate, nondiff_argnums=(1, 2))
_resize_axis.defvjp(_resize_axis_forward, _resize_axis_backward)
