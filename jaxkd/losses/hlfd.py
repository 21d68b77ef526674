"""Hierarchical Layer-selective Feedback Distillation: its two transfers.

Importance maps compare *where* feature maps are active, whatever their channels;
prediction maps compare softened distributions over channels behind a 1x1 projection.
Each exists for one map against one, and "unified" for several. Which layers feed which
transfer is the method's business (`jaxkd.distill.hlfd`). Concatenations are never
formed: mean powers and projections of concatenated maps are sums over the maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxkd.losses.checks import Scalar, check_maps, sum_per_example
from jaxkd.losses.logits import softened_kl
from jaxkd.numerics import l2_normalize, product_in_float32, resize_bilinear

Norm = Literal["code", "pixel"]
Size = tuple[int, int]


def importance_map(
    x: Float[Array, "b h w c"], *, exponent: int = 4
) -> Float32[Array, "b hw"]:
    """Where a feature map is active: a unit vector over its pixels.

        A(x) = a / max(||a||, 1e-12),    a = mean over channels of x^p

    Computed in float32 whatever the input: x^4 leaves float16 above 16. A map of
    zeros gives zeros and gets a zero gradient.

    Args:
      x: feature map.
      exponent: the even power p.

    Returns:
      float32 `[batch, height * width]`.

    Raises:
      ValueError: `x` is not a map, or `exponent` is not a positive even integer.
    """
    check_maps(x, what="importance maps")
    return _importance([x], _size(x), exponent)


def importance_map_distillation(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "..."],
    *,
    exponent: int = 4,
) -> Float32[Array, "b"]:
    """Individual transfer of importance maps: IMD.

        sum over pixels of (A(student) - A(teacher))^2

    The student is resized (bilinear, half-pixel centres, no antialiasing) to the size
    of the teacher, where they differ.

    Args:
      student: feature map; channels are free.
      teacher: feature map of the same batch; no gradient reaches it.
      exponent: the even power of `importance_map`.

    Returns:
      float32 `[batch]`, between 0 and 4.

    Raises:
      ValueError: an array is not a map, batches differ, or `exponent` is odd.

    Reference:
      Gorade et al., "Rethinking Intermediate Layers design in Knowledge Distillation
      for Kidney and Liver Tumor Segmentation", ISBI 2024 (loss of the authors' code).
    """
    return concatenated_importance_map_distillation(
        [student], teacher, exponent=exponent
    )


def concatenated_importance_map_distillation(
    students: Sequence[Float[Array, "b _ _ _"]],
    teacher: Float[Array, "..."],
    *,
    exponent: int = 4,
) -> Float32[Array, "b"]:
    """Several student maps against one teacher map: IMD of their concatenation.

    The student maps are resized to the smallest of them, then to the teacher's size.

    Args:
      students: feature maps of any sizes and channels.
      teacher: feature map; no gradient reaches it.
      exponent: the even power of `importance_map`.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: an array is not a map, batches differ, or `exponent` is odd.
    """
    check_maps(*students, teacher, what="importance maps")
    size = _size(teacher)
    a_student = _importance(students, size, exponent)
    a_teacher = _importance([jax.lax.stop_gradient(teacher)], size, exponent)
    return sum_per_example(jnp.square(a_student - a_teacher))


def unified_importance_map_distillation(
    student: Float[Array, "b h w c"],
    teachers: Sequence[Float[Array, "..."]],
    *,
    exponent: int = 4,
) -> Float32[Array, "b"]:
    """Unified transfer of importance maps: one student map learns from several.

    The teacher maps are resized to the smallest of them and concatenated on channels,
    then resized to the student's size: here, unlike in the individual transfer, it is
    the teacher that is resized.

    Args:
      student: feature map.
      teachers: feature maps of any sizes and channels; no gradient reaches them.
      exponent: the even power of `importance_map`.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: an array is not a map, batches differ, or `exponent` is odd.
    """
    check_maps(student, *teachers, what="importance maps")
    size = _size(student)
    a_student = _importance([student], size, exponent)
    constants = [jax.lax.stop_gradient(t) for t in teachers]
    a_teacher = _importance(constants, size, exponent)
    return sum_per_example(jnp.square(a_student - a_teacher))


def prediction_map_distillation(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "..."],
    kernel: Float[Array, "c k"] | None = None,
    bias: Float[Array, "k"] | None = None,
    *,
    temperature: Scalar = 4.0,
    norm: Norm = "code",
) -> Float32[Array, "b"]:
    """Individual transfer of prediction maps: PMD.

        T^2 / N * sum over pixels and channels of q (log q - log p)
        q = softmax(teacher / T),    p = softmax(resize(student W + b) / T)

    The student is projected to the teacher's channels and resized to its size. The
    published code divides by `N = h w c / 2`, the number of pixels for two classes;
    `norm="pixel"` divides by `h w` for any number.

    Args:
      student: prediction or feature map.
      teacher: prediction map `[batch, height, width, k]`, k >= 2; no gradient
        reaches it.
      kernel: 1x1 projection; None compares the student as it is.
      bias: of the projection.
      temperature: softens both distributions.
      norm: `"code"` or `"pixel"`, see above.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: the channels do not fit, there is one channel only (its softmax is
        constant), or `temperature` is not positive.

    Reference:
      Gorade et al., ISBI 2024 (loss of the authors' code); without projection Qin et
      al., "Efficient Medical Image Segmentation Based on Knowledge Distillation",
      IEEE TMI 2021.
    """
    return concatenated_prediction_map_distillation(
        [student], teacher, kernel, bias, temperature=temperature, norm=norm
    )


def concatenated_prediction_map_distillation(
    students: Sequence[Float[Array, "b _ _ _"]],
    teacher: Float[Array, "..."],
    kernel: Float[Array, "c k"] | None = None,
    bias: Float[Array, "k"] | None = None,
    *,
    temperature: Scalar = 4.0,
    norm: Norm = "code",
) -> Float32[Array, "b"]:
    """Several student maps against one teacher map: PMD of their concatenation.

    The student maps are resized to the smallest of them, projected to the teacher's
    channels, then resized to its size.

    Args:
      students: maps of any sizes and channels.
      teacher: prediction map; no gradient reaches it.
      kernel: 1x1 projection of the concatenated channels; None only for one map.
      bias: of the projection.
      temperature: softens both distributions.
      norm: see `prediction_map_distillation`.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: as `prediction_map_distillation`.
    """
    check_maps(*students, teacher, what="prediction maps")
    p = project(students, kernel, bias, size=_size(teacher))
    q = jax.lax.stop_gradient(teacher)
    return prediction_map_divergence(p, q, temperature=temperature, norm=norm)


def unified_prediction_map_distillation(
    student: Float[Array, "b h w c"],
    teachers: Sequence[Float[Array, "..."]],
    kernel: Float[Array, "k c"],
    bias: Float[Array, "c"],
    *,
    temperature: Scalar = 4.0,
    norm: Norm = "code",
) -> Float32[Array, "b"]:
    """Unified transfer of prediction maps: one student map learns from several.

    The teacher maps are resized to the smallest of them, concatenated and projected to
    the student's channels, then resized to its size. The softmax runs over the
    student's channels, which are not classes. The projection sits on the teacher's
    side: no gradient reaches the teacher, but one reaches the projection.

    Args:
      student: feature map with at least two channels.
      teachers: maps of any sizes and channels.
      kernel: 1x1 projection of the concatenated channels to the student's.
      bias: of the projection.
      temperature: softens both distributions.
      norm: see `prediction_map_distillation`.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: as `prediction_map_distillation`.
    """
    check_maps(student, *teachers, what="prediction maps")
    constants = [jax.lax.stop_gradient(t) for t in teachers]
    q = project(constants, kernel, bias, size=_size(student))
    return prediction_map_divergence(student, q, temperature=temperature, norm=norm)


def prediction_map_divergence(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar = 4.0,
    norm: Norm = "code",
) -> Float32[Array, "b"]:
    """Softened divergence over channels of maps of one shape, averaged over pixels.

    The core of the prediction-map transfers, differentiable in both arguments.

    Args:
      student: map with at least two channels.
      teacher: map of the same shape.
      temperature: softens both distributions.
      norm: see `prediction_map_distillation`.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: shapes differ, one channel, `norm` unknown, or `temperature` is not
        positive.
    """
    if norm not in ("code", "pixel"):
        raise ValueError(f"norm must be 'code' or 'pixel', got {norm!r}")
    channels = student.shape[-1]
    if channels < 2:
        raise ValueError(
            "prediction maps need at least 2 channels: the softmax of one is constant"
        )
    if student.shape != teacher.shape:
        raise ValueError(
            f"prediction maps have shapes {student.shape} (student) and "
            f"{teacher.shape} (teacher); project and resize one to the other"
        )
    pixels = student.shape[1] * student.shape[2]
    count = pixels * channels / 2 if norm == "code" else pixels
    divergence = softened_kl(student, teacher, temperature=temperature)
    return sum_per_example(divergence) / count


def project(
    maps: Sequence[Float[Array, "b _ _ _"]],
    kernel: Float[Array, "c k"] | None = None,
    bias: Float[Array, "k"] | None = None,
    *,
    size: Size | None = None,
) -> Float[Array, "b height width k"]:
    """Resizes maps to the smallest, concatenates, projects by 1x1, resizes to `size`.

    A 1x1 convolution commutes with bilinear resizing, bias included, because
    interpolation weights sum to one. If `size` is smaller than the smallest map, the
    maps are therefore projected last; only rounding differs.

    Args:
      maps: maps of any sizes and channels.
      kernel: `[sum of channels, k]`; None leaves a single map as it is.
      bias: `[k]`.
      size: height and width of the result; None for those of the smallest map.

    Returns:
      `[batch, height, width, k]`, float32 if projected.

    Raises:
      ValueError: the kernel does not fit the channels, or is missing for several maps.
    """
    check_maps(*maps, what="maps to project")
    middle = _smallest(maps)
    size = middle if size is None else size
    if kernel is None:
        if len(maps) != 1 or bias is not None:
            raise ValueError("several maps, or a bias, need a projection kernel")
        return resize_bilinear(maps[0], size)
    channels = [x.shape[-1] for x in maps]
    if kernel.shape[0] != sum(channels):
        raise ValueError(
            f"the projection takes {kernel.shape[0]} channels and the maps have "
            f"{' + '.join(map(str, channels))}"
        )
    fewest = min(middle, size, key=math.prod)
    parts, start = [], 0
    for x, count in zip(maps, channels, strict=True):
        resized = resize_bilinear(resize_bilinear(x, middle), fewest)
        parts.append(product_in_float32(resized, kernel[start : start + count]))
        start += count
    result = resize_bilinear(sum(parts[1:], parts[0]), size)
    if bias is None:
        return result
    return result + bias.astype(jnp.float32)[None, None, None]


def _importance(
    maps: Sequence[Float[Array, "b _ _ _"]], size: Size, exponent: int
) -> Float32[Array, "b hw"]:
    """Importance map of the concatenation of `maps`, resized to `size`."""
    if exponent < 2 or exponent % 2:
        raise ValueError(f"exponent must be a positive even integer, got {exponent}")
    middle = _smallest(maps)
    powers = []
    for x in maps:
        # Powers come after resizing: they do not commute with it.
        resized = resize_bilinear(resize_bilinear(x, middle), size)
        powers.append(jnp.sum(resized.astype(jnp.float32) ** exponent, axis=-1))
    mean = sum(powers[1:], powers[0]) / sum(x.shape[-1] for x in maps)
    return l2_normalize(mean.reshape(mean.shape[0], -1), axis=-1)


def _size(x: Float[Array, "b h w c"]) -> Size:
    return x.shape[1], x.shape[2]


def _smallest(maps: Sequence[Float[Array, "b _ _ _"]]) -> Size:
    """The smallest size, heights first, as the published code orders them."""
    return min(_size(x) for x in maps)
