"""Intra-class feature variation distillation."""

from __future__ import annotations

import jax

from jaxkd import losses
from jaxkd.distill.checks import check_segmentation
from jaxkd.distill.map_pairs import same_grid
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Specs,
    Terms,
    Weight,
    no_state,
)
from jaxkd.distill.registry import register


@register()
def ifvd(
    *, factor: Weight = 200.0, student_tap: str = "d2", teacher_tap: str = "d2"
) -> Method:
    """How similar each pixel is to the centre of its class (Wang et al., 2020).

    The centre of a class is the mean feature of its pixels in one image:

        factor * mean over batch and pixels of
          (cos(s_p, centre_s(y_p)) - cos(t_p, centre_t(y_p)))^2

    Needs: a feature map of each network, of one size, before the classifier; channels
    may differ, nothing is trained along. Labels are resized to the maps by copying
    pixels; those outside the student's classes, such as 255, give 0 and count in the
    mean.

    Cost: two sums over the pixels per class.

    Pitfalls: on coarse maps small objects vanish from the resized labels.

    Paper and code: the code adds a pixel-wise term of weight 10, the mean over pixels
    and classes, and a critic of weight 0.001: `weighted({"ce": 1.0, "kd": 10 / classes,
    "ifvd": 1.0, "skd_holistic": 1.0}, kd={"temperature": 1.0}, skd_holistic={"factor":
    0.001})`.

    Args:
      factor: weight of the term; a number or a schedule.
      student_tap: a feature map of the student.
      teacher_tap: a feature map of the teacher.

    Reference:
      Wang et al., "Intra-class Feature Variation Distillation for Semantic
      Segmentation", ECCV 2020.
    """

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_segmentation("ifvd", specs.student)
        same_grid(specs, student_tap, teacher_tap)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        value = losses.ifvd(
            inputs.student.taps[student_tap],
            inputs.teacher.taps[teacher_tap],
            inputs.labels,
            num_classes=inputs.student.logits.shape[-1],
        )
        return {"ifvd": value}, memory

    return Method(init=init, terms=terms, weights={"ifvd": factor}, num_teachers=1)
