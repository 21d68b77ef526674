"""Which taps a method compares, chosen by name or by depth.

Methods over all stages pair the taps "stage1", "stage2", ... of student and teacher in
depth order; methods over one place take the last stage or the pooled vector. The
options `student_taps`, `teacher_taps`, `student_tap` and `teacher_tap` name others.
They are chosen in a method's `init`, where mistakes are reported before any array
exists, and chosen again in its `terms`, from the shapes of the outputs: `networks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxkd.distill.method import Inputs, Specs
from jaxkd.layers import NetworkSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """A student and its first teacher, as `Specs` has them.

    Attributes:
      student: shapes of the student's outputs.
      teacher: those of the teacher's.
    """

    student: NetworkSpec
    teacher: NetworkSpec


def networks(inputs: Inputs) -> Networks:
    """Reads in a method's `terms` what `Specs` told its `init`, off the outputs."""
    return Networks(
        student=NetworkSpec.from_outputs("student", inputs.student),
        teacher=NetworkSpec.from_outputs("teacher", inputs.teacher),
    )


def stage_pairs(
    specs: Specs | Networks,
    student_taps: Sequence[str] | None = None,
    teacher_taps: Sequence[str] | None = None,
) -> list[tuple[str, str]]:
    """Pairs the student's taps with those of the first teacher, in the order given.

    Args:
      specs: the networks.
      student_taps: taps of the student; None takes its stages.
      teacher_taps: taps of the teacher; None takes its stages.

    Returns:
      `(student_tap, teacher_tap)` from the shallowest to the deepest stage.

    Raises:
      KeyError: a network lacks one of the taps.
      ValueError: a network has no stages, no taps are left to compare, or the numbers
        of taps differ.
    """
    student, teacher = specs.student, specs.teacher
    chosen_student = _chosen(student, student_taps, option="student_taps")
    chosen_teacher = _chosen(teacher, teacher_taps, option="teacher_taps")
    if len(chosen_student) != len(chosen_teacher):
        raise ValueError(
            f"student {student.name!r} has {len(chosen_student)} taps "
            f"({', '.join(chosen_student)}) and teacher {teacher.name!r} has "
            f"{len(chosen_teacher)} ({', '.join(chosen_teacher)}); set student_taps "
            f"and teacher_taps to lists of one length"
        )
    return list(zip(chosen_student, chosen_teacher, strict=True))


def last_stage(
    spec: NetworkSpec, tap: str | None = None, *, option: str = "student_tap"
) -> str:
    """The tap at the end of the network's last stage, or `tap` if it is given.

    Args:
      spec: the network.
      tap: a tap chosen by the user.
      option: the option that chooses the tap, named in the error.

    Raises:
      KeyError: the network has no tap `tap`.
      ValueError: the network has no stages.
    """
    if tap is not None:
        spec.tap(tap)
        return tap
    if not spec.stages:
        raise ValueError(_without_stages(spec, option))
    return spec.stages[-1]


def pooled(
    spec: NetworkSpec, tap: str | None = None, *, option: str = "student_tap"
) -> str:
    """The tap of the pooled feature vector, or `tap` if it is given.

    Args:
      spec: the network.
      tap: a tap chosen by the user.
      option: the option that chooses the tap, named in the error.

    Raises:
      KeyError: the network has no tap `tap`.
      ValueError: the network has no tap "pooled", or the tap is no vector.
    """
    if tap is None and "pooled" not in spec.taps:
        raise ValueError(
            f"network {spec.name!r} has no tap 'pooled'; set {option} to a tap of "
            f"shape (channels,), it has {', '.join(spec.taps) or 'none'}"
        )
    tap = "pooled" if tap is None else tap
    shape = spec.tap(tap)
    if len(shape) != 1:
        raise ValueError(
            f"tap {tap!r} of network {spec.name!r} has shape {shape}; set {option} to "
            f"a tap of shape (channels,)"
        )
    return tap


def before_relu(spec: NetworkSpec, stage: str) -> str:
    """The tap that holds a stage's value before its last ReLU.

    Raises:
      ValueError: the network has no such tap.
    """
    tap = f"{stage}_pre"
    if tap not in spec.taps:
        raise ValueError(
            f"network {spec.name!r} has no tap {tap!r} (its {stage!r} before the last "
            f"ReLU); name other taps, it has {', '.join(spec.taps) or 'none'}"
        )
    return tap


def _chosen(
    spec: NetworkSpec, taps: Sequence[str] | None, *, option: str
) -> tuple[str, ...]:
    if taps is None:
        if not spec.stages:
            raise ValueError(_without_stages(spec, option))
        return spec.stages
    if isinstance(taps, str) or not taps:
        raise ValueError(f"{option} must be a list of tap names, got {taps!r}")
    for tap in taps:
        spec.tap(tap)
    return tuple(taps)


def _without_stages(spec: NetworkSpec, option: str) -> str:
    return (
        f"network {spec.name!r} has no taps 'stage1', 'stage2', ...; set {option}, it "
        f"has {', '.join(spec.taps) or 'none'}"
    )
