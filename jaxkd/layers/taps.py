"""Small convolutions and their gradients as matrix products over pixels of the kernel.

For kernels, strides and channels where XLA's own are slow on the CPU: 1x1 convolutions,
strides above 1, and the first layer's three channels. Each product reads the images at
one offset, so nothing is multiplied by inserted zeros.

Images are `[batch, height, width, channels]`, kernels `[height, width, in, out]`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.layers.chunks import map_images, sum_images

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


def convolution_by_taps(
    images: Float[Array, "b h w c"],
    kernel: Float[Array, "size_h size_w c k"],
    *,
    strides: Pair,
    padding: Padding,
) -> Float[Array, "b new_h new_w k"]:
    """The convolution (without flipping the kernel).

    What the taps read lies side by side, for one matrix product.
    """
    height, width, channels, features = kernel.shape
    rows, columns = (
        (n + low + high - size) // stride + 1
        for n, (low, high), size, stride in zip(
            images.shape[1:3], padding, (height, width), strides, strict=True
        )
    )

    def part(images: jax.Array) -> jax.Array:
        padded = _pad(images, padding)
        taps = [
            _tap(padded, i, j, strides, (rows, columns))
            for i in range(height)
            for j in range(width)
        ]
        return jax.lax.dot_general(
            jnp.concatenate(taps, axis=-1),
            kernel.reshape(height * width * channels, features),
            (((3,), (0,)), ((), ())),
        )

    if height == width == 1:
        return part(images)
    return map_images(part, images, values=height * width * rows * columns * channels)


def kernel_gradient_by_taps(
    images: Float[Array, "b h w c"],
    gradient: Float[Array, "b new_h new_w k"],
    *,
    size: Pair,
    strides: Pair,
    padding: Padding,
) -> Float[Array, "size_h size_w c k"]:
    """The gradient of a kernel of the given size, summed over images."""
    _, rows, columns, features = gradient.shape
    channels = images.shape[-1]

    def part(images: jax.Array, gradient: jax.Array) -> list[jax.Array]:
        padded = _pad(images, padding)
        right = gradient.reshape(-1, features)
        return [
            jax.lax.dot_general(
                _tap(padded, i, j, strides, (rows, columns)).reshape(-1, channels),
                right,
                (((0,), (0,)), ((), ())),
            )
            for i in range(size[0])
            for j in range(size[1])
        ]

    sums = sum_images(
        part, images, gradient, values=size[0] * size[1] * rows * columns * channels
    )
    return jnp.stack(sums).reshape(*size, channels, features)


def input_gradient_by_taps(
    gradient: Float[Array, "b new_h new_w k"],
    kernel: Float[Array, "size_h size_w c k"],
    *,
    image_size: Pair,
    strides: Pair,
    padding: Padding,
) -> Float[Array, "b h w c"]:
    """The gradient of images of the given size.

    Pixels whose positions leave the same remainders by the strides read the same pixels
    of the kernel; each such phase is summed by itself, and phases are interleaved.
    """
    channels = kernel.shape[2]
    height, width = image_size
    rows, columns = (
        -(-n // stride) for n, stride in zip(image_size, strides, strict=True)
    )

    def part(gradient: jax.Array) -> jax.Array:
        batch, new_rows, new_columns, _ = gradient.shape

        def shifted(down: int, right: int) -> jax.Array:
            # Row u of the result is row u + down of the gradient, zero beyond it.
            edges = [
                (0, 0, 0),
                (-down, rows + down - new_rows, 0),
                (-right, columns + right - new_columns, 0),
                (0, 0, 0),
            ]
            return jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), edges)

        def phase(a: int, b: int) -> jax.Array:
            terms = [
                jax.lax.dot_general(
                    shifted((a + padding[0][0] - i) // strides[0],
                            (b + padding[1][0] - j) // strides[1]),
                    kernel[i, j],
                    (((3,), (1,)), ((), ())),
                )
                for i in range(kernel.shape[0])
                for j in range(kernel.shape[1])
                if (a + padding[0][0] - i) % strides[0] == 0
                and (b + padding[1][0] - j) % strides[1] == 0
            ]  # fmt: skip
            if not terms:
                return jnp.zeros((batch, rows, columns, channels), gradient.dtype)
            return sum(terms[1:], start=terms[0])

        phases = [
            jnp.stack([phase(a, b) for b in range(strides[1])], axis=3)
            for a in range(strides[0])
        ]
        joined = jnp.stack(phases, axis=2)
        joined = joined.reshape(
            batch, rows * strides[0], columns * strides[1], channels
        )
        return joined[:, :height, :width]

    return map_images(part, gradient, values=2 * height * width * channels)


def _tap(padded: jax.Array, i: int, j: int, strides: Pair, size: Pair) -> jax.Array:
    """What pixel (i, j) of a kernel reads for each result."""
    strided = padded[:, i :: strides[0], j :: strides[1]]
    return strided[:, : size[0], : size[1]]


def _pad(images: jax.Array, padding: Padding) -> jax.Array:
    edges = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    return jax.lax.pad(images, jnp.zeros((), images.dtype), edges)
