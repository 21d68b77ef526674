"""3x3 convolutions of stride 1 with 16 multiplications where the definition has 36.

Winograd's F(2x2, 3x3): a tile of 4x4 pixels gives 2x2 results. Tile and kernel are each
turned into 16 numbers per channel, the 16 pairs are multiplied - one matrix product
over channels each - and the 16 products are added up into the 2x2 results. All factors
of the transforms are 1, -1 and 1/2, and float32 results are as near to exact ones as
those of the direct sum.

With `t` the transforms of Lavin and Gray, for one channel and one axis:

    results = output_terms(input_terms(pixels) * kernel_terms(kernel))

Images are `[batch, height, width, channels]`, kernels `[3, 3, in, out]`; `padding` is
`((low, high), (low, high))` and may be negative.

Reference: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
CVPR 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxkd.layers.chunks import map_images, sum_images

Padding = tuple[tuple[int, int], tuple[int, int]]
Grid = Sequence[Sequence[jax.Array]]

_KERNEL_TERMS = np.array(
    [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32
)
# Both axes at once: from 9 numbers of a kernel to 16.
_KERNEL_TERMS_2D = np.kron(_KERNEL_TERMS, _KERNEL_TERMS)


def winograd_convolution(
    images: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c k"], padding: Padding
) -> Float[Array, "b new_h new_w k"]:
    """The convolution (without flipping the kernel) of stride 1."""
    return _convolve(images, _kernel_terms(kernel, _KERNEL_TERMS_2D), 0, padding)


def winograd_input_gradient(
    gradient: Float[Array, "b new_h new_w k"],
    kernel: Float[Array, "3 3 c k"],
    padding: Padding,
) -> Float[Array, "b h w c"]:
    """The images' gradient: the convolution of the results' one, kernel flipped."""
    (top, bottom), (left, right) = padding
    flipped = _kernel_terms(kernel, _KERNEL_TERMS_2D[:, ::-1])
    return _convolve(
        gradient, flipped, 1, ((2 - top, 2 - bottom), (2 - left, 2 - right))
    )


def winograd_kernel_gradient(
    images: Float[Array, "b h w c"],
    gradient: Float[Array, "b new_h new_w k"],
    padding: Padding,
) -> Float[Array, "3 3 c k"]:
    """The kernel's gradient, summed over images."""
    _, height, width, features = gradient.shape
    channels = images.shape[-1]

    def part(images: jax.Array, gradient: jax.Array) -> list[jax.Array]:
        left = _input_grid(images, padding, (height, width))
        right = _gradient_grid(gradient)
        return [
            _over_pixels(a, b)
            for left_row, right_row in zip(left, right, strict=True)
            for a, b in zip(left_row, right_row, strict=True)
        ]

    sums = sum_images(
        part, images, gradient, values=16 * _tiles(height, width) * (channels + features)
    )
    terms = jnp.stack(sums).reshape(16, channels * features)
    kernel = jnp.asarray(_KERNEL_TERMS_2D.T) @ terms
    return kernel.reshape(3, 3, channels, features)


def _convolve(
    images: jax.Array, kernel: Sequence[jax.Array], axis: int, padding: Padding
) -> jax.Array:
    """The convolution with a transformed kernel, whose axis `axis` is summed over."""
    (top, bottom), (left, right) = padding
    _, height, width, channels = images.shape
    height, width = height + top + bottom - 2, width + left + right - 2
    features = kernel[0].shape[1 - axis]

    def part(images: jax.Array) -> jax.Array:
        grid = _input_grid(images, padding, (height, width))
        products = [
            [
                jax.lax.dot_general(x, kernel[4 * i + j], (((3,), (axis,)), ((), ())))
                for j, x in enumerate(row)
            ]
            for i, row in enumerate(grid)
        ]
        results = _both_axes(_output_terms, products)
        # [b, h/2, w/2, k] of the four pixels of a tile -> [b, h, w, k].
        joined = jnp.stack([jnp.stack(row, axis=3) for row in results], axis=2)
        _, rows, _, columns, _, _ = joined.shape
        joined = joined.reshape(-1, 2 * rows, 2 * columns, features)
        return joined[:, :height, :width]

    return map_images(
        part, images, values=16 * _tiles(height, width) * (channels + features)
    )


def _tiles(height: int, width: int) -> int:
    return -(-height // 2) * -(-width // 2)


def _kernel_terms(kernel: jax.Array, matrix: np.ndarray) -> list[jax.Array]:
    """The 16 `[in, out]` matrices of a kernel."""
    _, _, channels, features = kernel.shape
    terms = jnp.asarray(matrix) @ kernel.reshape(9, channels * features)
    return list(terms.reshape(16, channels, features))


def _input_grid(images: jax.Array, padding: Padding, new_size: tuple[int, int]) -> Grid:
    """4x4 arrays `[b, h/2, w/2, c]`: the transformed tiles."""
    rows, columns = (-(-size // 2) for size in new_size)
    edges = [
        # An odd size has a last tile that reaches one pixel further.
        (low, high + size % 2, 0)
        for (low, high), size in zip(padding, new_size, strict=True)
    ]
    padded = jax.lax.pad(
        images, jnp.zeros((), images.dtype), [(0, 0, 0), *edges, (0, 0, 0)]
    )
    pixels = [
        [padded[:, i:][:, : 2 * rows : 2, j:][:, :, : 2 * columns : 2] for j in range(4)]
        for i in range(4)
    ]
    return _both_axes(_input_terms, pixels)


def _gradient_grid(gradient: jax.Array) -> Grid:
    """4x4 arrays `[b, h/2, w/2, k]`: the transformed tiles of a gradient."""
    _, height, width, _ = gradient.shape
    edges = [(0, 0, 0), (0, height % 2, 0), (0, width % 2, 0), (0, 0, 0)]
    even = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), edges)
    pixels = [[even[:, i::2, j::2] for j in range(2)] for i in range(2)]
    return _both_axes(_gradient_terms, pixels)


def _both_axes(
    terms: Callable[[Sequence[jax.Array]], list[jax.Array]], grid: Grid
) -> list[list[jax.Array]]:
    """Applies the transform of one axis to the columns and then to the rows."""
    columns = [terms(column) for column in zip(*grid, strict=True)]
    return [terms(row) for row in zip(*columns, strict=True)]


def _input_terms(d: Sequence[jax.Array]) -> list[jax.Array]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _output_terms(m: Sequence[jax.Array]) -> list[jax.Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _gradient_terms(g: Sequence[jax.Array]) -> list[jax.Array]:
    """The transpose of `_output_terms`."""
    return [g[0], g[0] + g[1], g[0] - g[1], -g[1]]


def _over_pixels(a: jax.Array, b: jax.Array) -> jax.Array:
    """`[b, h, w, c]` and `[b, h, w, k]` -> `[c, k]`.

    One long axis: contracting three makes XLA transpose an operand first.
    """
    a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())))
