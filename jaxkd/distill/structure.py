"""Structured knowledge distillation: pixels, pairs of regions, and a critic."""

from __future__ import annotations

from typing import Literal

import jax

from jaxkd import losses
from jaxkd.distill.checks import check_same_logits, check_segmentation, feature_map
from jaxkd.distill.holistic import skd_holistic
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Specs,
    Terms,
    Weight,
    compose,
    no_state,
)
from jaxkd.distill.registry import register
from jaxkd.losses.structure import region_grid


@register()
def skd_pixel(
    *, factor: Weight = 10.0, reduction: Literal["sum", "mean"] = "sum"
) -> Method:
    """The teacher's class probabilities at every pixel (Liu et al., 2019).

        factor / (h w) * sum over batch and pixels of
          -sum_k softmax(teacher)_k log softmax(student)_k

    Needs: logits of one shape.

    Cost: two softmaxes over the logits.

    Pitfalls: the published sum over the batch grows with the batch, here with that of
    all devices together; when the batch changes, use `reduction="mean"` and a factor
    chosen for it. The teacher's entropy is the floor of the value.

    Args:
      factor: weight of the term; a number or a schedule.
      reduction: over the batch: `"sum"` as published, or `"mean"`.

    Reference:
      Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR
      2019.
    """

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_segmentation("skd_pixel", specs.student)
        check_same_logits(specs.student, specs.teacher)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        value = losses.skd_pixel(
            inputs.student.logits, inputs.teacher.logits, reduction=reduction
        )
        return {"skd_pixel": value}, memory

    return Method(init=init, terms=terms, weights={"skd_pixel": factor}, num_teachers=1)


@register()
def skd_pair(
    *,
    factor: Weight = 1.0,
    scale: float = 0.5,
    student_tap: str = "e5",
    teacher_tap: str = "e5",
) -> Method:
    """How similar the regions of an image are to each other (Liu et al., 2019).

    Maps are max-pooled to a few regions, whose features are divided by their norm; the
    squared differences of the two matrices of inner products are averaged:

        factor / B * sum_b sum_ij (G(student)_ij - G(teacher)_ij)^2 / regions^2

    Needs: a deep feature map of each network. Channels may differ, and sizes as long
    as the number of regions is the same: nothing is trained along.

    Cost: negligible.

    Pitfalls: at scale 0.5 only four regions are compared (more on odd sides). The norm
    carries no gradient, so the loss also scales the student's features.

    Args:
      factor: weight of the term; a number or a schedule.
      scale: side of a pooling window as a share of the side of the map.
      student_tap: a feature map of the student.
      teacher_tap: a feature map of the teacher.

    Raises:
      ValueError: `scale` is outside (0, 1].

    Reference:
      Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR
      2019.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale must be above 0 and at most 1, got {scale}")

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        student, teacher = specs.student, specs.teacher
        size_s = feature_map(student, student_tap)[:2]
        size_t = feature_map(teacher, teacher_tap)[:2]
        if region_grid(size_s, scale) != region_grid(size_t, scale):
            raise ValueError(
                f"tap {student_tap!r} of student {student.name!r} is "
                f"{size_s[0]}x{size_s[1]} and tap {teacher_tap!r} of teacher "
                f"{teacher.name!r} is {size_t[0]}x{size_t[1]}; at scale {scale} they "
                f"have different numbers of regions"
            )
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        value = losses.skd_pair(
            inputs.student.taps[student_tap],
            inputs.teacher.taps[teacher_tap],
            scale=scale,
        )
        return {"skd_pair": value}, memory

    return Method(init=init, terms=terms, weights={"skd_pair": factor}, num_teachers=1)


@register()
def skd(
    *,
    pixel: Weight = 10.0,
    pair: Weight = 1.0,
    holistic: Weight = 0.1,
    width: int = 64,
    student_tap: str = "e5",
    teacher_tap: str = "e5",
) -> Method:
    """All of structured knowledge distillation: pixels, regions and a critic.

    The methods `skd_pixel`, `skd_pair` and `skd_holistic` with their published weights,
    to be used beside a task loss: `weighted({"ce": 1.0, "skd": 1.0})`.

    Needs: logits of one shape, and a deep feature map of each network.

    Cost: that of the critic, see `skd_holistic`.

    Args:
      pixel: weight of `skd_pixel`.
      pair: weight of `skd_pair`.
      holistic: weight of `skd_holistic`.
      width: channels of the critic's first layer.
      student_tap: a feature map of the student, for `skd_pair`.
      teacher_tap: a feature map of the teacher, for `skd_pair`.

    Raises:
      ValueError: `width` is not positive.

    Reference:
      Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR
      2019.
    """
    return compose(
        {
            "skd_pixel": skd_pixel(factor=pixel),
            "skd_pair": skd_pair(
                factor=pair, student_tap=student_tap, teacher_tap=teacher_tap
            ),
            "skd_holistic": skd_holistic(factor=holistic, width=width),
        }
    )
