"""Consistency of two segmenters at several scales (MGD for semi-supervision).

Whole images by their mean logits, regions by their similarities to each other, pixels
by cross-entropy with labels or with another network's predictions.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Integer

from jaxkd.losses.checks import check_choice, check_logits, check_maps, keep
from jaxkd.losses.supervised import cross_entropy
from jaxkd.numerics import adaptive_average_pool, l2_normalize


def semantic_consistency(
    student: Float[Array, "b h w k"],
    teacher: Float[Array, "..."],
    *,
    reduction: Literal["sum", "mean"] = "sum",
) -> Float32[Array, "b"]:
    """Distance of the mean logits of whole images (Qin et al., 2022).

        B * sum_k |mean_hw student_k - mean_hw teacher_k|

    The published loss is a sum over batch and classes; the factor `B`, the size of the
    whole batch, makes the mean over the returned values equal to it.

    Args:
      student: logits.
      teacher: logits of the same shape; no gradient reaches them.
      reduction: `"sum"` as published, `"mean"` divides it by batch and classes.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: the logits are no maps, or shapes or class counts differ.

    Reference:
      Qin et al., "Multi-Granularity Distillation Scheme Towards Lightweight
      Semi-Supervised Semantic Segmentation", ECCV 2022 (the authors' code).
    """
    check_maps(student, teacher, what="logits")
    check_logits(student, teacher)
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    # The mean of the difference, which is exactly zero for equal logits.
    mean = jnp.mean(student.astype(jnp.float32) - teacher, axis=(1, 2))
    distance = mean * jnp.sign(jax.lax.stop_gradient(mean))  # no slope at zero
    check_choice("reduction", reduction, ("sum", "mean"))
    if reduction == "mean":
        return jnp.mean(distance, axis=-1)
    return student.shape[0] * jnp.sum(distance, axis=-1)


def content_consistency(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "..."],
    *,
    regions: int = 7,
) -> Float32[Array, "b"]:
    """Squared difference of the regions' cosines (Qin et al., 2022).

        mean_mn (cos(s_m, s_n) - cos(t_m, t_n))^2

    over all pairs of `regions x regions` averages of each map. A region of zeros has
    cosine 0 (the published code divides by zero).

    Args:
      student: feature map.
      teacher: feature map; size and channels may differ. No gradient reaches it.
      regions: rows and columns of the average pooling.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: an array is not a map, batches differ, or `regions` is below 1.

    Reference:
      Qin et al., "Multi-Granularity Distillation Scheme Towards Lightweight
      Semi-Supervised Semantic Segmentation", ECCV 2022 (the authors' code).
    """
    check_maps(student, teacher, what="content features")

    def cosines(x: Float[Array, "b h w c"]) -> Float32[Array, "b m m"]:
        pooled = adaptive_average_pool(x.astype(jnp.float32), regions)
        flat = pooled.reshape(pooled.shape[0], -1, pooled.shape[-1])
        unit = l2_normalize(flat, eps=1e-6)
        return jnp.einsum("bmc,bnc->bmn", unit, unit, precision="highest")

    difference = cosines(student) - cosines(jax.lax.stop_gradient(teacher))
    return jnp.mean(jnp.square(difference), axis=(1, 2))


def labelled_cross_entropy(
    logits: Float[Array, "b h w k"],
    labels: Integer[Array, "..."],
    *,
    ignore_index: int = 255,
) -> Float32[Array, "b h w"]:
    """Cross-entropy whose mean is that of the labelled pixels.

        -(pixels / labelled pixels) log softmax(z)_y,    0 where y is ignored

    with both counts over the whole batch. `cross_entropy(where=...)` is the same
    without the factor: its mean counts ignored pixels as zeros.

    Args:
      logits: of the student.
      labels: class indices, or the pseudo labels of another network.
      ignore_index: the label of pixels that do not count.

    Returns:
      float32 `[batch, height, width]`; zeros if no pixel is labelled.

    Raises:
      ValueError: the shapes do not fit.
    """
    labelled = labels != ignore_index
    safe = jnp.where(labelled, labels, 0)
    values = keep(cross_entropy(logits, safe), labelled)
    return values * (labels.size / jnp.maximum(jnp.sum(labelled), 1))
