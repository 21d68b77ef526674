"""Function matching: distillation with patience and consistent views."""

from __future__ import annotations

import jax

from jaxkd import losses
from jaxkd.distill.checks import check_same_logits
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Scheduled,
    Specs,
    Terms,
    no_state,
)
from jaxkd.distill.registry import register
from jaxkd.losses.checks import check_positive


@register()
def function_matching(*, temperature: Scheduled = 1.0) -> Method:
    """The student matches its teachers as functions (Beyer et al., 2022).

    The loss is that of `kd`, summed over the teachers. What makes the method is the
    recipe: teacher and student see exactly the same crop, flip and mixture of images,
    the crops are aggressive, the schedule is very long, and there are no labels.

        sum over teachers of T^2 * KL(softmax(teacher / T) || softmax(student / T))

    Needs: logits of one shape from one or more teachers. Labels are not read; compose
    with no `ce`, or use it for monitoring with weight 0.

    Cost: a forward pass of every teacher at every step, on the augmented images; labels
    that were computed once per image miss the point.

    Pitfalls: several teachers add up, they are not averaged. A teacher that is fed
    another view, or stored predictions, is what the authors call inconsistent.

    Paper and code: the code bounds the teacher's probabilities at 1e-8 before their
    logarithm; here the logarithm is exact, and the gradient is the same.

    Published: ImageNet top-1 (authors' table): BiT-ResNet50x1 82.8 at 224 pixels from a
    BiT-ResNet152x2 with 83.0.

    Args:
      temperature: softens all distributions; a number or a schedule.

    Raises:
      ValueError: `temperature` is not positive.

    Reference:
      Beyer et al., "Knowledge Distillation: A Good Teacher Is Patient and
      Consistent", CVPR 2022.
    """
    check_positive("temperature", temperature)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        for teacher in specs.teachers or (specs.teacher,):
            check_same_logits(specs.student, teacher)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        value = losses.function_matching(
            inputs.student.logits,
            [teacher.logits for teacher in inputs.teachers],
            temperature=inputs.at(temperature),
        )
        return {"function_matching": value}, memory

    return Method(
        init=init,
        terms=terms,
        weights={"function_matching": 1.0},
        num_teachers="many",
    )
