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

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxkd.layers.chunks import map_images, sum_images

Padding = tuple[tuple[int, int], tuple[int, int]]

_KERNEL_TERMS = np.array(
    [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32
)
# Both axes at once: from 9 numbers of a kernel to 16, columns first.
_KERNEL_TERMS_2D = np.einsum("ia,jb->jiab", _KERNEL_TERMS, _KERNEL_TERMS).reshape(16, 9)


def winograd_convolution(
    images: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c k"], padding: Padding
) -> Float[Array, "b new_h new_w k"]:
    """The convolution (without flipping the kernel) of stride 1."""
    return _convolve(images, _kernel_terms(kernel, _KERNEL_TERMS_2D), 1, padding)


def winograd_input_gradient(
    gradient: Float[Array, "b new_h new_w k"],
    kernel: Float[Array, "3 3 c k"],
    padding: Padding,
) -> Float[Array, "b h w c"]:
    """The images' gradient: the convolution of the results' one, kernel flipped."""
    (top, bottom), (left, right) = padding
    flipped = _kernel_terms(kernel, _KERNEL_TERMS_2D[:, ::-1])
    return _convolve(
        gradient, flipped, 2, ((2 - top, 2 - bottom), (2 - left, 2 - right))
    )


def winograd_kernel_gradient(
    images: Float[Array, "b h w c"],
    gradient: Float[Array, "b new_h new_w k"],
    padding: Padding,
) -> Float[Array, "3 3 c k"]:
    """The kernel's gradient, summed over images."""
    _, height, width, features = gradient.shape
    channels = images.shape[-1]

    def part(images: jax.Array, gradient: jax.Array) -> jax.Array:
        left = _input_tiles(images, padding, (height, width))
        right = _gradient_tiles(gradient)
        return jax.lax.dot_general(
            left.reshape(16, -1, channels),
            right.reshape(16, -1, features),
            (((1,), (1,)), ((0,), (0,))),
        )

    values = 16 * _tiles(height, width) * (channels + features)
    terms = sum_images(part, images, gradient, values=values)
    kernel = jnp.asarray(_KERNEL_TERMS_2D.T) @ terms.reshape(16, channels * features)
    return kernel.reshape(3, 3, channels, features)


def _convolve(
    images: jax.Array, kernel: jax.Array, axis: int, padding: Padding
) -> jax.Array:
    """The convolution with a transformed kernel, whose axis `axis` is summed over."""
    (top, bottom), (left, right) = padding
    _, height, width, channels = images.shape
    height, width = height + top + bottom - 2, width + left + right - 2
    features = kernel.shape[3 - axis]

    def part(images: jax.Array) -> jax.Array:
        tiles = _input_tiles(images, padding, (height, width))
        batch, rows, columns = tiles.shape[2:5]
        products = jax.lax.dot_general(
            tiles.reshape(16, -1, channels), kernel, (((2,), (axis,)), ((0,), (0,)))
        )
        products = products.reshape(4, 4, batch, rows, columns, features)
        # Two columns of two rows each, `[b, h/2, w/2, k]` -> [b, h, w, k].
        results = [_output_terms(column) for column in _output_terms(products)]
        joined = jnp.stack(
            [jnp.stack(row, axis=3) for row in zip(*results, strict=True)], axis=2
        )
        joined = joined.reshape(batch, 2 * rows, 2 * columns, features)
        return joined[:, :height, :width]

    return map_images(
        part, images, values=16 * _tiles(height, width) * (channels + features)
    )


def _tiles(height: int, width: int) -> int:
    return -(-height // 2) * -(-width // 2)


def _kernel_terms(kernel: jax.Array, matrix: np.ndarray) -> jax.Array:
    """The 16 matrices `[16, in, out]` of a kernel."""
    _, _, channels, features = kernel.shape
    terms = jnp.asarray(matrix) @ kernel.reshape(9, channels * features)
    return terms.reshape(16, channels, features)


def _input_tiles(
    images: jax.Array, padding: Padding, new_size: tuple[int, int]
) -> jax.Array:
    """The transformed tiles, `[4, 4, b, h/2, w/2, c]`."""
    rows, columns = (-(-size // 2) for size in new_size)
    edges = [
        # An odd size has a last tile that reaches one pixel further.
        (low, high + size % 2, 0)
        for (low, high), size in zip(padding, new_size, strict=True)
    ]
    padded = _pad(images, edges)
    across = [padded[:, i : i + 2 * rows - 1 : 2] for i in range(4)]
    terms = jnp.stack(_input_terms(across))
    along = [terms[:, :, :, j : j + 2 * columns - 1 : 2] for j in range(4)]
    return jnp.stack(_input_terms(along))


def _gradient_tiles(gradient: jax.Array) -> jax.Array:
    """The transformed tiles of a gradient, `[4, 4, b, h/2, w/2, k]`."""
    _, height, width, _ = gradient.shape
    even = _pad(gradient, [(0, height % 2, 0), (0, width % 2, 0)])
    terms = jnp.stack(_gradient_terms([even[:, i::2] for i in range(2)]))
    return jnp.stack(_gradient_terms([terms[:, :, :, j::2] for j in range(2)]))


def _pad(images: jax.Array, edges: Sequence[tuple[int, int, int]]) -> jax.Array:
    edges = [(0, 0, 0), *edges, (0, 0, 0)]
    return jax.lax.pad(images, jnp.zeros((), images.dtype), edges)


def _input_terms(d: Sequence[jax.Array] | jax.Array) -> list[jax.Array]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _output_terms(m: Sequence[jax.Array] | jax.Array) -> list[jax.Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _gradient_terms(g: Sequence[jax.Array] | jax.Array) -> list[jax.Array]:
    """The transpose of `_output_terms`."""
    return [g[0], g[0] + g[1], g[0] - g[1], -g[1]]
