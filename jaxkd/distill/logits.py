"""Methods that compare logits with one teacher."""

from __future__ import annotations

import jax

from jaxkd import losses
from jaxkd.distill.checks import check_same_logits, first_teacher
from jaxkd.distill.method import Batch, Memory, Method, Params, Terms, no_state
from jaxkd.distill.registry import register
from jaxkd.layers import NetworkSpec, Outputs
from jaxkd.losses.checks import check_positive


@register()
def kd(*, temperature: float = 4.0) -> Method:
    """Knowledge distillation of softened logits (Hinton et al., 2015).

    Works on class logits and, pixel by pixel, on segmentation logits. The usual recipe
    is `weighted({"ce": 0.1, "kd": 0.9})`.

    Args:
      temperature: softens both distributions.

    Raises:
      ValueError: `temperature` is not positive.
    """
    check_positive("temperature", temperature)

    def init(
        key: jax.Array, student: NetworkSpec, teachers: tuple[NetworkSpec, ...]
    ) -> tuple[Params, Memory]:
        check_same_logits(student, first_teacher("kd", teachers))
        return no_state(key, student, teachers)

    def terms(
        params: Params,
        memory: Memory,
        student: Outputs,
        teachers: tuple[Outputs, ...],
        batch: Batch,
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[Terms, Memory]:
        del params, batch, key, step
        value = losses.kd(student.logits, teachers[0].logits, temperature=temperature)
        return {"kd": value}, memory

    return Method(init=init, terms=terms, weights={"kd": 1.0}, num_teachers=1)
