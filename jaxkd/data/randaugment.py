"""RandAugment on the device: a few strong operations drawn for each image.

Fourteen operations of one common strength (Cubuk et al., 2020), as a pure function to
be called inside the jitted step. As in `jaxkd.data.augment`, what happens to a record
depends on `(key, epoch, index)` only. Under jit every operation is computed for every
image and one is kept, except that the five geometric ones share a single gather.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Shaped

Image = Float[Array, "h w c"]
Strength = float | jax.Array

OPERATIONS = (
    "identity",
    "autocontrast",
    "equalize",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""The operations, in the order in which they are numbered."""

# The first of those that move pixels.
_ROTATE = OPERATIONS.index("rotate")
# Keeps these draws apart from others that a record makes from its key.
_STREAM = 0x52A
_LUMA = (0.299, 0.587, 0.114)


def rand_augment(
    images: Float[Array, "b h w c"],
    *,
    key: jax.Array,
    epoch: int | jax.Array,
    index: Integer[Array, " b"],
    num_ops: int = 2,
    magnitude: float = 10.0,
    fill: float = 0.0,
) -> Float[Array, "b h w c"]:
    """Applies `num_ops` random operations to each image (Cubuk et al., 2020).

    With m = magnitude / 10, and a random sign for each draw of those marked +-:

        rotate +-30 m degrees            color, contrast, brightness, sharpness:
        shear_x, shear_y +-0.3 m           blend by the factor 1 +- 0.9 m
        translate_x, translate_y         posterize to 8 - round(4 m) bits
          +-0.453 m of the size          solarize values above 1 - m

    `identity`, `autocontrast` and `equalize` have no strength. Full strength is that of
    torchvision's RandAugment at its last bin; there and here a larger magnitude is a
    stronger distortion in every operation, which it is not in the first published code.

    Args:
      images: values in [0, 1], one channel (grey) or three (RGB).
      key: the run's key; the same at every step.
      epoch: number of the epoch.
      index: record numbers.
      num_ops: operations per image, drawn uniformly and with replacement.
      magnitude: common strength, from 0 to 10.
      fill: what lies outside the image.

    Returns:
      Images of the same shape, float32 in [0, 1].

    Raises:
      ValueError: `num_ops` is below 1, `magnitude` not in [0, 10], or images have other
        than one or three channels.

    Reference:
      Cubuk et al., "RandAugment: Practical Automated Data Augmentation with a Reduced
      Search Space", NeurIPS 2020.
    """
    if num_ops < 1:
        raise ValueError(f"num_ops must be >= 1, got {num_ops}")
    if not 0 <= magnitude <= 10:
        raise ValueError(f"magnitude must be between 0 and 10, got {magnitude}")
    if images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images must have one channel or three, got shape {images.shape}"
        )
    epoch_key = jax.random.fold_in(jax.random.fold_in(key, _STREAM), epoch)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(epoch_key, index)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (num_ops, 2)))(keys)
    images = images.astype(jnp.float32)
    for i in range(num_ops):
        operation = (draws[:, i, 0] * len(OPERATIONS)).astype(jnp.int32)
        share = jnp.where(draws[:, i, 1] < 0.5, -1.0, 1.0) * (magnitude / 10)
        images = jax.vmap(apply_operation, (0, 0, 0, None))(
            images, operation, share, fill
        )
    return images


def apply_operation(
    image: Image, operation: Int[Array, ""] | int, share: Strength, fill: float = 0.0
) -> Image:
    """Applies one operation by number.

    Args:
      image: one image, values in [0, 1].
      operation: position in `OPERATIONS`.
      share: signed strength, from -1 to 1.
      fill: what lies outside the image.
    """
    size = jnp.abs(share)
    height, width, _ = image.shape
    angle = share * math.radians(30)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    shear, shift = 0.3 * share, share * (150 / 331)
    # For each output position (column, row) the position that it reads; a turn is about
    # the centre, a shear about the corner.
    x, y = width / 2, height / 2
    maps = jnp.array(
        [
            [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]],
            [[1, shear, 0], [0, 1, 0]],
            [[1, 0, 0], [shear, 1, 0]],
            [[1, 0, shift * width], [0, 1, 0]],
            [[1, 0, 0], [0, 1, shift * height]],
        ],
        jnp.float32,
    )
    factor = 1 + 0.9 * share
    branches = [
        lambda: image,
        lambda: autocontrast(image),
        lambda: equalize(image),
        lambda: solarize(image, 1 - size),
        lambda: blend(_grey(image), image, factor),
        lambda: posterize(image, 8 - jnp.round(4 * size).astype(jnp.int32)),
        lambda: blend(jnp.mean(_grey(image)), image, factor),
        lambda: blend(0.0, image, factor),
        lambda: blend(smooth(image), image, factor),
        lambda: affine(image, maps[jnp.clip(operation - _ROTATE, 0, 4)], fill),
    ]
    return jax.lax.switch(jnp.minimum(operation, _ROTATE), branches)


def autocontrast(image: Image) -> Image:
    """Stretches each channel to [0, 1]; a constant channel stays."""
    low = jnp.min(image, axis=(0, 1), keepdims=True)
    span = jnp.max(image, axis=(0, 1), keepdims=True) - low
    return jnp.where(span > 0, (image - low) / jnp.where(span > 0, span, 1.0), image)


def equalize(image: Image) -> Image:
    """Flattens the histogram of each channel, at 256 levels.

    A level becomes the number of pixels below it, in units of a 255th of all pixels but
    those of the brightest level. Channels of fewer than 255 such pixels stay.
    """

    def one(levels: Int[Array, "h w"]) -> Int[Array, "h w"]:
        counts = jnp.zeros(256, jnp.int32).at[levels].add(1)
        step = (levels.size - counts[jnp.max(levels)]) // 255
        below = jnp.cumsum(counts) - counts
        table = (below + step // 2) // jnp.maximum(step, 1)
        return jnp.where(step > 0, jnp.minimum(table, 255)[levels], levels)

    return jax.vmap(one, 2, 2)(_levels(image)) / 255


def solarize(image: Image, threshold: Strength) -> Image:
    """Inverts the values that are not below `threshold`."""
    return jnp.where(image < threshold, image, 1 - image)


def posterize(image: Image, bits: Int[Array, ""] | int) -> Image:
    """Keeps the first `bits` of eight bits."""
    dropped = 8 - bits
    return ((_levels(image) >> dropped) << dropped) / 255


def blend(base: jax.Array | float, image: Image, factor: Strength) -> Image:
    """`image` at factor 1, `base` at 0, clipped to [0, 1] beyond."""
    return jnp.clip(base + factor * (image - base), 0, 1)


def smooth(image: Image) -> Image:
    """A weighted mean with the eight neighbours; the outermost pixels stay.

    The weights are 5/13 for the pixel and 1/13 for each neighbour.
    """
    height, width, _ = image.shape
    if min(height, width) < 3:
        return image
    total = 4 * image[1:-1, 1:-1]
    for row in range(3):
        for column in range(3):
            total += image[row : height - 2 + row, column : width - 2 + column]
    return image.at[1:-1, 1:-1].set(total / 13)


def affine(image: Image, matrix: Float[Array, "2 3"], fill: float) -> Image:
    """Moves pixels: each output reads the nearest input, or `fill` outside.

    Args:
      image: one image.
      matrix: takes `(column, row, 1)` of an output, measured from the corner to the
        centre of a pixel, to the position that it reads.
      fill: value outside.
    """
    height, width, _ = image.shape
    columns = jnp.arange(width, dtype=jnp.float32)[None, :] + 0.5
    rows = jnp.arange(height, dtype=jnp.float32)[:, None] + 0.5
    column, row = (
        jnp.floor(a * columns + b * rows + c).astype(jnp.int32) for a, b, c in matrix
    )
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    values = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
    return jnp.where(inside[..., None], values, fill)


def _grey(image: Image) -> Float[Array, "h w 1"]:
    """Luminance; of a grey image the image itself."""
    if image.shape[-1] == 1:
        return image
    weights = jnp.asarray(_LUMA, image.dtype)[None, None, :]
    return jnp.sum(image * weights, axis=-1, keepdims=True)


def _levels(image: Shaped[Array, "h w c"]) -> Int[Array, "h w c"]:
    return jnp.round(jnp.clip(image, 0, 1) * 255).astype(jnp.int32)
