"""Methods that compare logits with one teacher."""

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
def kd(*, temperature: Scheduled = 4.0) -> Method:
    """Knowledge distillation of softened logits (Hinton et al., 2015).

    Works on class logits and, pixel by pixel, on segmentation logits. The usual recipe
    is `weighted({"ce": 0.1, "kd": 0.9})`.

    Args:
      temperature: softens both distributions; a number or a schedule.

    Raises:
      ValueError: `temperature` is not positive.
    """
    check_positive("temperature", temperature)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_same_logits(specs.student, specs.teacher)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        value = losses.kd(
            inputs.student.logits,
            inputs.teacher.logits,
            temperature=inputs.at(temperature),
        )
        return {"kd": value}, memory

    return Method(init=init, terms=terms, weights={"kd": 1.0}, num_teachers=1)
