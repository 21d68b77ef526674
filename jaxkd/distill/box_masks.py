"""CutMix masks for semi-supervised segmentation."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32


def box_masks(
    key: jax.Array,
    count: int,
    size: Sequence[int],
    *,
    boxes: int = 3,
    area: tuple[float, float] = (0.25, 0.5),
) -> Float32[Array, "count h w 1"]:
    """Masks that are 1 inside random boxes and 0 outside.

    A box covers `p / boxes` of the image, `p ~ U(area)`: its height is a share
    `p^u / sqrt(boxes)` of the image's, `u ~ U(0, 1)`, and its width what is left. Boxes
    lie inside the image. Each inverts what it covers, so that two cancel where they
    overlap.

    Args:
      key: random key.
      count: masks.
      size: `(height, width)`.
      boxes: boxes per mask.
      area: range of the covered share, before overlaps.

    Returns:
      float32 `[count, height, width, 1]`, zeros and ones.

    Raises:
      ValueError: `boxes` is below 1, or `area` is no range within (0, 1].

    Reference:
      French et al., "Semi-supervised Semantic Segmentation Needs Strong, Varied
      Perturbations", BMVC 2020 (the authors' code).
    """
    if boxes < 1:
        raise ValueError(f"boxes must be >= 1, got {boxes}")
    low, high = area
    if not 0 < low <= high <= 1:
        raise ValueError(f"area must be a range within (0, 1], got {area}")
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    share = jax.random.uniform(area_key, (count, boxes), minval=low, maxval=high)
    tall = share ** jax.random.uniform(aspect_key, (count, boxes))
    sides = jnp.stack([tall, share / tall], axis=-1) / boxes**0.5
    image = jnp.asarray(size, jnp.float32).reshape(1, 1, 2)
    lengths = jnp.round(sides * image)
    free = image - lengths
    starts = jnp.round(free * jax.random.uniform(place_key, (count, boxes, 2)))

    def covered(axis: int) -> jax.Array:
        pixel = jnp.arange(size[axis], dtype=jnp.float32).reshape(1, 1, -1)
        start, length = starts[..., axis, None], lengths[..., axis, None]
        return (pixel >= start) & (pixel < start + length)

    inside = covered(0)[..., :, None] & covered(1)[..., None, :]
    return (jnp.sum(inside, axis=1) % 2).astype(jnp.float32)[..., None]
