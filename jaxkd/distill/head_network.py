"""Methods that train the replaced first part of a network to restore its features."""

from __future__ import annotations

from typing import Literal

import jax

from jaxkd import losses
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Specs,
    Terms,
    no_state,
)
from jaxkd.distill.registry import register
from jaxkd.distill.taps import Networks, networks, stage_pairs

Reduction = Literal["sum", "mean"]


@register()
def ghnd(
    *,
    student_taps: tuple[str, ...] | None = None,
    teacher_taps: tuple[str, ...] | None = None,
    reduction: Reduction = "sum",
) -> Method:
    """Squared errors of several stages, summed over everything (BottleFit, 2022).

    Generalised head-network distillation: a student whose first stages are replaced by
    a bottleneck restores the teacher's features where the bottleneck ends and in all
    stages after it, which it shares with the teacher. There is no loss on labels:

        sum over taps sum over batch, positions and channels (student - teacher)^2

    The network is `bottlefit` or `bottlefit_seg`; the stages after its bottleneck start
    from the teacher's parameters and stay frozen. A second stage of training then
    lowers the error of the classifier, with the labels and possibly the teacher's
    logits.

    Needs: student and teacher taps of equal shapes. By default all stages of the
    student ("stage2" and what follows it in `bottlefit`), and the teacher's taps of the
    same names; segmentation networks must name them, e.g. e3, e4, e5.

    Cost: nothing beside the teacher's forward pass.

    Pitfalls: with "sum" the loss and its gradient grow with the batch size and the size
    of the maps, so that learning rates do not carry over to plain gradient descent;
    the published recipe uses Adam, which is indifferent to the scale. Frozen stages
    still see other activations than in the teacher: the published code lets their batch
    norms use the statistics of the batch, and move.

    Paper and code: the published code sums over the batch, which is the default;
    "mean" is the mean over the examples of their sums.

    Args:
      student_taps: taps of the student, in the order of `teacher_taps`.
      teacher_taps: taps of the teacher.
      reduction: over the batch.

    Raises:
      ValueError: taps that differ in number or shape.

    Reference:
      Matsubara et al., "BottleFit: Learning Compressed Representations in Deep Neural
      Networks for Effective and Efficient Split Computing", WoWMoM 2022. The loss:
      Matsubara and Levorato, "Neural Compression and Filtering for Edge-assisted
      Real-time Object Detection in Challenged Networks", ICPR 2020.
    """
    return _method("ghnd", student_taps, teacher_taps, reduction, first_only=False)


@register()
def hnd(
    *,
    student_tap: str | None = None,
    teacher_tap: str | None = None,
    reduction: Reduction = "sum",
) -> Method:
    """Squared error where a bottleneck ends (Matsubara et al., 2019).

    Head-network distillation, the forerunner of `ghnd`: the replaced part of the
    network alone is trained, and only on the map that it restores:

        sum over batch, positions and channels (student - teacher)^2

    Needs: a student and a teacher tap of equal shapes; by default the student's first
    stage ("stage2" in `bottlefit`) and the teacher's tap of the same name.

    Cost: nothing beside the teacher's forward pass; stages after the tap need no
    gradient.

    Pitfalls: those of `ghnd`. Errors that the later stages would amplify count as much
    as those they would ignore.

    Args:
      student_tap: tap of the student.
      teacher_tap: tap of the teacher.
      reduction: over the batch, as in `ghnd`.

    Raises:
      ValueError: taps of different shapes.

    Reference:
      Matsubara et al., "Distilled Split Deep Neural Networks for Edge-assisted
      Real-time Systems", HotEdgeVideo 2019.
    """
    student_taps = None if student_tap is None else (student_tap,)
    teacher_taps = None if teacher_tap is None else (teacher_tap,)
    return _method("hnd", student_taps, teacher_taps, reduction, first_only=True)


def _method(
    name: str,
    student_taps: tuple[str, ...] | None,
    teacher_taps: tuple[str, ...] | None,
    reduction: Reduction,
    *,
    first_only: bool,
) -> Method:
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")

    def pairs(specs: Specs | Networks) -> list[tuple[str, str]]:
        of_student = student_taps
        if of_student is None:
            stages = specs.student.stages
            of_student = (stages[:1] if first_only else stages) or None
        of_teacher = of_student if teacher_taps is None else teacher_taps
        return stage_pairs(specs, of_student, of_teacher)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        for student, teacher in pairs(specs):
            shapes = specs.student.tap(student), specs.teacher.tap(teacher)
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{name} compares tap {student!r} of {specs.student.name!r}, of "
                    f"shape {shapes[0]}, with tap {teacher!r} of "
                    f"{specs.teacher.name!r}, of shape {shapes[1]}; they must be equal"
                )
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        errors = [
            losses.squared_error_sum(
                inputs.student.taps[student], inputs.teacher.taps[teacher]
            )
            for student, teacher in pairs(networks(inputs))
        ]
        value = sum(errors[1:], errors[0])
        # The step averages over the batch; the published loss is a sum.
        return {name: value * len(value) if reduction == "sum" else value}, memory

    return Method(init=init, terms=terms, weights={name: 1.0}, num_teachers=1)
