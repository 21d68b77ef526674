"""Channel-wise distillation of dense predictions and features."""

from __future__ import annotations

import jax

from jaxkd import losses
from jaxkd.distill.checks import check_same_logits, check_segmentation
from jaxkd.distill.map_pairs import same_grid
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Scheduled,
    Specs,
    Terms,
    Weight,
    no_state,
)
from jaxkd.distill.registry import register
from jaxkd.layers import fan_in_uniform
from jaxkd.losses.checks import check_positive


@register()
def cwd(
    *,
    factor: Weight = 3.0,
    temperature: Scheduled = 4.0,
    student_tap: str | None = None,
    teacher_tap: str | None = None,
) -> Method:
    """Where each channel is active, as a distribution over space (Shu et al., 2021).

    Every channel of the logits becomes a distribution over the pixels of its image:

        factor * T^2 / (B C) * sum_bc KL(q_bc || p_bc)
        q = softmax_hw(teacher / T),    p = softmax_hw(student / T)

    Needs: logits of one shape. With both taps named, those feature maps are compared
    in place of the logits; they must have one size, and where their channels differ a
    1x1 convolution without bias, trained along, leads from the student's to the
    teacher's.

    Cost: two softmaxes over the maps.

    Pitfalls: the value is independent of a constant added to a channel, so which class
    wins at a pixel is left to the task loss. Features want another factor than logits.

    Args:
      factor: weight of the term; a number or a schedule.
      temperature: softens both distributions; a number or a schedule.
      student_tap: a feature map of the student in place of its logits.
      teacher_tap: a feature map of the teacher in place of its logits.

    Raises:
      ValueError: `temperature` is not positive, or only one tap is named.

    Reference:
      Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021.
    """
    check_positive("temperature", temperature)
    if (student_tap is None) != (teacher_tap is None):
        raise ValueError(
            f"name both student_tap and teacher_tap, or neither to compare logits; got "
            f"{student_tap!r} and {teacher_tap!r}"
        )

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        if student_tap is None or teacher_tap is None:
            check_segmentation("cwd", specs.student)
            check_same_logits(specs.student, specs.teacher)
            return no_state(key, specs)
        channels = same_grid(specs, student_tap, teacher_tap)
        if channels[0] == channels[1]:
            return no_state(key, specs)
        return {"kernel": fan_in_uniform(key, channels)}, {}

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        student, teacher = inputs.student.logits, inputs.teacher.logits
        if student_tap is not None and teacher_tap is not None:
            student = inputs.student.taps[student_tap]
            teacher = inputs.teacher.taps[teacher_tap]
        if "kernel" in params:
            student = student @ params["kernel"].astype(student.dtype)
        value = losses.cwd(student, teacher, temperature=inputs.at(temperature))
        return {"cwd": value}, memory

    return Method(init=init, terms=terms, weights={"cwd": factor}, num_teachers=1)
