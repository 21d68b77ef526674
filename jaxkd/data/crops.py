"""Random crops as fractions of an image, and cutting them out on the device.

Boxes are fractions of the image and become pixels by truncation in one place, so that
whoever is shown the same box of the same image later is shown the same pixels.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Num

_TRIES = 10


def draw_crops(
    key: jax.Array,
    records: int,
    regions: int,
    *,
    scale: tuple[float, float] = (0.08, 0.936),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    aspect: float = 1.0,
) -> Float32[Array, "n r 4"]:
    """Draws boxes of random area, shape and place.

    Area is uniform, width by height log-uniform; a box that does not fit is drawn
    again, up to ten times, and then replaced by the largest central box within
    `ratio`.

    Args:
      key: random key.
      records: number of images.
      regions: boxes per image.
      scale: smallest and largest area, as shares of the image.
      ratio: smallest and largest width by height, in pixels.
      aspect: width by height of the images.

    Returns:
      `(top, left, height, width)` as fractions, float32 `[records, regions, 4]`.

    Raises:
      ValueError: an impossible range.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be increasing within (0, 1], got {scale}")
    if not 0 < ratio[0] <= ratio[1] < math.inf or not aspect > 0:
        raise ValueError(
            f"ratio must be increasing and aspect above 0, got {ratio} and {aspect}"
        )
    area_key, ratio_key, corner_key = jax.random.split(key, 3)
    shape = (records, regions, _TRIES)
    area = jax.random.uniform(area_key, shape, minval=scale[0], maxval=scale[1])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    drawn = jnp.exp(jax.random.uniform(ratio_key, shape, minval=low, maxval=high))
    size = jnp.sqrt(jnp.stack([area * aspect / drawn, area / aspect * drawn], axis=-1))
    fits = jnp.all(size <= 1, axis=-1)
    first = jnp.argmax(fits, axis=-1)[..., None, None]
    size = jnp.take_along_axis(size, first, axis=2)[:, :, 0]
    central = jnp.array(
        [[[min(1.0, aspect / ratio[0]), min(1.0, ratio[1] / aspect)]]], jnp.float32
    )
    fitted = jnp.any(fits, axis=-1, keepdims=True)
    place = jax.random.uniform(corner_key, (records, regions, 2))
    corner = jnp.where(fitted, place * (1 - size), (1 - central) / 2)
    return jnp.concatenate([corner, jnp.where(fitted, size, central)], axis=-1)


def crop_and_flip(
    images: Num[Array, "b h w c"],
    coords: Float[Array, "b 4"],
    flip: Bool[Array, "b"],
    *,
    size: tuple[int, int],
) -> Num[Array, "b new_h new_w c"]:
    """Cuts one box out of each image, resizes it and mirrors it.

    Top, left, height and width in pixels are the fractions times the image's size,
    truncated, and at least one pixel. Bilinear with half-pixel centres, never
    antialiased; nothing outside the box is read.

    Args:
      images: `[batch, height, width, channels]`; integer types are rounded again.
      coords: `(top, left, height, width)` as fractions.
      flip: which crops are mirrored left-right.
      size: new `(height, width)`.

    Returns:
      Crops `[batch, *size, channels]` in the dtype of `images`.

    Raises:
      ValueError: a size below 1.
    """
    if min(size) < 1:
        raise ValueError(f"size must be two integers above 0, got {size}")
    return jax.vmap(functools.partial(crop_one, size=size))(images, coords, flip)


def crop_one(
    image: jax.Array, coords: jax.Array, flip: jax.Array, *, size: tuple[int, int]
) -> jax.Array:
    """`crop_and_flip` of one image `[height, width, channels]`."""
    values = image.astype(jnp.float32)
    for axis in (0, 1):
        length = image.shape[axis]
        box = jnp.maximum((coords[2 + axis] * length).astype(int), 1)
        start = jnp.minimum((coords[axis] * length).astype(int), length - box)
        position = (jnp.arange(size[axis]) + 0.5) * (box / size[axis]) - 0.5
        position = jnp.clip(position, 0, box - 1)
        low = jnp.floor(position).astype(int)
        fraction = jnp.expand_dims(position - low, (1, 2) if axis == 0 else (0, 2))
        first = jnp.take(values, start + low, axis)
        second = jnp.take(values, start + jnp.minimum(low + 1, box - 1), axis)
        values = first * (1 - fraction) + second * fraction
    values = jnp.where(flip, values[:, ::-1], values)
    if jnp.issubdtype(image.dtype, jnp.integer):
        values = jnp.round(values)
    return values.astype(image.dtype)
