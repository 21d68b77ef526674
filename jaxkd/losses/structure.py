"""Structured knowledge distillation: pixels alone, and regions in pairs.

The third part, a critic that judges whole maps, has parameters of its own and is made
by the method `skd_holistic`; its penalty is in `jaxkd.losses.wasserstein`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from jaxkd.losses.checks import check_choice, check_maps, sum_per_example
from jaxkd.losses.logits import kd_cross_entropy


def skd_pixel(
    student: Float[Array, "b h w k"],
    teacher: Float[Array, "..."],
    *,
    reduction: Literal["sum", "mean"] = "sum",
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "b h w"]:
    """Cross-entropy with the teacher's pixels, summed over the batch (Liu et al.).

        B * -sum_k softmax(teacher)_k log softmax(student)_k

    The published loss is the sum over batch and pixels divided by `h w` only; the
    factor `B`, the size of the whole batch, makes the mean over the returned values
    equal to it. The teacher's entropy is the floor of the value.

    Args:
      student: logits.
      teacher: logits of the same shape; no gradient reaches them.
      reduction: `"sum"` keeps the factor `B`, `"mean"` leaves it out.
      where: which pixels count; the others get 0.

    Returns:
      float32 `[batch, height, width]`.

    Raises:
      ValueError: the logits are no maps, or shapes or class counts differ.

    Reference:
      Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR
      2019.
    """
    check_maps(student, teacher, what="logits")
    values = kd_cross_entropy(student, teacher, temperature=1.0, where=where)
    check_choice("reduction", reduction, ("sum", "mean"))
    return values * (student.shape[0] if reduction == "sum" else 1)


def skd_pair(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "..."],
    *,
    scale: float = 0.5,
) -> Float32[Array, "b"]:
    """Squared difference of the regions' similarities (Liu et al., 2019).

        sum_ij (G(student)_ij - G(teacher)_ij)^2 / regions^2
        G(x)_ij = <x_i, x_j>,    x_i = m_i / stop_gradient(||m_i|| + 1e-8)

    where `m` is the map after max-pooling with windows of `scale` of its sides, so
    that 0.5 leaves 2x2 regions (3x3 on odd sides: the last window is cut off). The
    norm carries no gradient, so the student's features may also grow or shrink.

    Args:
      student: feature map.
      teacher: feature map; channels may differ, and its size as long as the number of
        regions is the same. No gradient reaches it.
      scale: side of a window as a share of the side of the map.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: an array is not a map, a window is empty, or regions differ.

    Reference:
      Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR
      2019 (reduction and windows of the authors' code).
    """
    check_maps(student, teacher, what="pair-wise features")
    regions = region_grid(student.shape[1:3], scale)
    if regions != region_grid(teacher.shape[1:3], scale):
        raise ValueError(
            f"student features {student.shape[1:3]} and teacher features "
            f"{teacher.shape[1:3]} have different numbers of regions at scale {scale}"
        )
    gram_s = _region_similarity(student, scale)
    gram_t = _region_similarity(jax.lax.stop_gradient(teacher), scale)
    count = regions[0] * regions[1]
    return sum_per_example(jnp.square(gram_s - gram_t)) / count**2


def region_grid(size: tuple[int, ...], scale: float) -> tuple[int, int]:
    """The rows and columns of regions that `skd_pair` makes of a map.

    Args:
      size: `(height, width)` of the map.
      scale: as in `skd_pair`.

    Raises:
      ValueError: `scale` is outside (0, 1], or a window is empty.

    >>> region_grid((8, 9), 0.5)
    (2, 3)
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale must be above 0 and at most 1, got {scale}")
    if min(int(scale * n) for n in size) < 1:
        raise ValueError(
            f"maps of {size[0]}x{size[1]} have no regions at scale {scale}; take a "
            f"larger map"
        )
    rows, columns = (-(-n // int(scale * n)) for n in size)
    return rows, columns


def _region_similarity(
    x: Float[Array, "b h w c"], scale: float
) -> Float32[Array, "b regions regions"]:
    pooled = _pool_regions(x.astype(jnp.float32), scale)
    norm = jnp.linalg.norm(jax.lax.stop_gradient(pooled), axis=-1, keepdims=True)
    unit = pooled / (norm + 1e-8)
    return jnp.einsum("bmc,bnc->bmn", unit, unit, precision="highest")


def _pool_regions(
    x: Float32[Array, "b h w c"], scale: float
) -> Float32[Array, "b regions c"]:
    """Maxima over windows; the gradient goes to the first maximum in row-major order.

    `jnp.max` would divide it among ties, which are common after a ReLU.
    """
    batch, height, width, channels = x.shape
    rows, columns = region_grid((height, width), scale)
    tall, wide = int(scale * height), int(scale * width)
    margins = ((0, 0), (0, rows * tall - height), (0, columns * wide - width), (0, 0))
    x = jnp.pad(x, margins, constant_values=-jnp.inf)
    x = x.reshape(batch, rows, tall, columns, wide, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, tall * wide, channels)
    first = jnp.argmax(x, axis=2, keepdims=True)
    return jnp.take_along_axis(x, first, axis=2)[:, :, 0]
