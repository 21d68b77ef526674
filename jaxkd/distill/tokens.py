"""Distillation through a token: DeiT."""

from __future__ import annotations

from typing import Literal

import jax

from jaxkd import losses
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
    weight_at,
)
from jaxkd.distill.registry import register
from jaxkd.losses.checks import check_fraction, check_positive

TAPS = "cls_logits", "dist_logits"


@register()
def deit(
    *,
    distillation: Literal["hard", "soft"] = "hard",
    alpha: Scheduled = 0.5,
    temperature: Scheduled = 1.0,
    soft_norm: Literal["classes", "batch"] = "classes",
    label_smoothing: float = 0.0,
) -> Method:
    """A token of its own learns from the teacher (Touvron et al., 2021).

    A vision transformer has a distillation token beside its class token, each with a
    head of its own. At test time the network averages both heads' logits.

        (1 - alpha) * CE(class head, label) + alpha * D
        hard: D = CE(distillation head, argmax teacher)
        soft: D = T^2 KL(softmax(teacher / T) || softmax(distillation head / T)) / K

    Needs: a student with the taps `cls_logits` and `dist_logits`, and labels, which are
    soft where images are mixed. The cross-entropy is part of the method, since the
    student's averaged logits, which `ce` reads, get no loss: compose it with no `ce`.

    Cost: nothing beside the teacher's forward pass; the token adds one position to
    every layer of the student.

    Pitfalls: the teacher must see the mixed image; its decision is then one class, and
    not the mixed label. In the hard form the temperature is not used.

    Paper and code: the code divides the soft form by the number of classes K as well
    (`soft_norm="classes"`, kept as its published normalisation); `soft_norm="batch"`
    is the usual mean over the batch.

    Published: ImageNet top-1 (authors' table), hard form, without and with the token:
    DeiT-Tiny 72.2 -> 74.5, DeiT-Small 79.9 -> 81.2, DeiT-Base 81.8 -> 83.4.

    Args:
      distillation: the form of the term `distillation`.
      alpha: its share; the term `ce` has the rest.
      temperature: of the soft form.
      soft_norm: divisor of the soft form: classes and batch, or the batch alone.
      label_smoothing: of the term `ce`, for labels that the data do not smooth.

    Raises:
      ValueError: `alpha` or `label_smoothing` is outside [0, 1], or `temperature` is
        not positive.

    Reference:
      Touvron et al., "Training data-efficient image transformers & distillation
      through attention", ICML 2021.
    """
    check_positive("temperature", temperature)
    if not callable(alpha):
        check_fraction("alpha", alpha)
    check_fraction("label_smoothing", label_smoothing)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        student, teacher = specs.student, specs.teacher
        missing = [tap for tap in TAPS if tap not in student.taps]
        if missing:
            raise ValueError(
                f"method 'deit' needs a student with a distillation token; network "
                f"{student.name!r} lacks the taps {', '.join(missing)}"
            )
        shapes = [student.tap(tap) for tap in TAPS]
        if set(shapes) != {teacher.logits}:
            raise ValueError(
                f"teacher {teacher.name!r} has logits of shape {teacher.logits} and "
                f"the heads of student {student.name!r} {shapes}; they must be equal"
            )
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        class_logits, student = (inputs.student.taps[tap] for tap in TAPS)
        teacher = inputs.teacher.logits
        if distillation == "hard":
            value = losses.hard_distillation(student, teacher)
        else:
            value = losses.kd(student, teacher, temperature=inputs.at(temperature))
            if soft_norm == "classes":
                value = value / student.shape[-1]
        ce = losses.cross_entropy(
            class_logits, inputs.targets, label_smoothing=label_smoothing
        )
        return {"ce": ce, "distillation": value}, memory

    return Method(
        init=init,
        terms=terms,
        weights={"ce": _rest(alpha), "distillation": alpha},
        num_teachers=1,
    )


def _rest(share: Weight) -> Weight:
    if not callable(share):
        return 1.0 - share
    return lambda step: 1.0 - weight_at(share, step)
