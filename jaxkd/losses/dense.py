"""Losses between dense predictions and features of a student and a teacher.

Relations of pixels and regions, as opposed to the pixel-by-pixel divergences in
`jaxkd.losses.logits` and the feature-map comparisons in `jaxkd.losses.hlfd`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Num

from jaxkd.losses.checks import check_maps, sum_per_example
from jaxkd.numerics import l2_normalize, resize_nearest


def region_affinity(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "..."],
    foreground: Num[Array, "_ height width"] | Bool[Array, "_ height width"],
) -> Float32[Array, "b"]:
    """Contrast between foreground and background features (EMKD, region affinity).

        (c(student) - c(teacher))^2,    c(x) = cos(r0, r1)
        r0 = sum(x m0) / sum(m0),       r1 = sum(x m1) / (sum(m1) + 1)

    with the sums over pixels, channel by channel; m1 is the foreground resized to the
    feature map (nearest) and m0 = 1 - m1. Without foreground, or without background,
    c is 0 (the published code divides by zero in the second case).

    Args:
      student: feature map.
      teacher: feature map; size and channels may differ. No gradient reaches it.
      foreground: mask at any resolution, nonzero inside the object.

    Returns:
      float32 `[batch]`, between 0 and 4.

    Raises:
      ValueError: an array is not a map, or batches differ.

    Reference:
      Qin et al., "Efficient Medical Image Segmentation Based on Knowledge
      Distillation", IEEE TMI 2021 (loss of the authors' code).
    """
    check_maps(student, teacher, what="region features")
    if foreground.shape[0] != student.shape[0]:
        raise ValueError(
            f"foreground has batch size {foreground.shape[0]} and the features "
            f"{student.shape[0]}"
        )
    mask = (foreground != 0).astype(jnp.float32)[..., None]
    c_student = _region_cosine(student, mask)
    c_teacher = _region_cosine(jax.lax.stop_gradient(teacher), mask)
    return jnp.square(c_student - c_teacher)


def _region_cosine(
    x: Float[Array, "b h w c"], mask: Float32[Array, "b height width 1"]
) -> Float32[Array, "b"]:
    """Cosine of the mean features inside and outside the mask."""
    x = x.astype(jnp.float32)
    inside = resize_nearest(mask, (x.shape[1], x.shape[2]))
    outside = 1.0 - inside
    area = jnp.sum(outside, axis=(1, 2))
    r0 = jnp.sum(x * outside, axis=(1, 2)) / jnp.where(area > 0, area, 1.0)
    r1 = jnp.sum(x * inside, axis=(1, 2)) / (jnp.sum(inside, axis=(1, 2)) + 1.0)
    unit0 = l2_normalize(r0, axis=-1, eps=1e-8)
    unit1 = l2_normalize(r1, axis=-1, eps=1e-8)
    return sum_per_example(unit0 * unit1)
