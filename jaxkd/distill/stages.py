"""The maps of several stages that a method compares, pair by pair.

A method names its taps twice: in `init`, where they are checked, and in `terms`, where
they are read. `StageTaps` keeps both in step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax

from jaxkd.distill.checks import feature_map
from jaxkd.distill.method import Inputs, Specs
from jaxkd.distill.taps import before_relu, stage_pairs
from jaxkd.layers import NetworkSpec, Outputs

Names = tuple[str, ...]


def stages(spec: NetworkSpec) -> Names:
    """The ends of all stages."""
    return spec.stages


def stem_and_stages(spec: NetworkSpec) -> Names:
    """The ends of all stages and, where there is one, of the stem before them."""
    stem = ("stem",) if "stem" in spec.taps and spec.stages else ()
    return (*stem, *spec.stages)


def stages_before_relu(spec: NetworkSpec) -> Names:
    """The ends of all stages before their last ReLU.

    Raises:
      ValueError: the network has stages without such a tap.
    """
    return tuple(before_relu(spec, stage) for stage in spec.stages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageTaps:
    """Taps of student and teacher, chosen by the user or by default.

    Attributes:
      student: the user's choice for the student; None takes the default.
      teacher: that for the teacher.
      default: the taps of a network that are taken if the user names none.
    """

    student: Sequence[str] | None
    teacher: Sequence[str] | None
    default: Callable[[NetworkSpec], Names] = stages

    def pairs(self, specs: Specs, *, at_least: int = 1) -> list[tuple[str, str]]:
        """The names of the taps, checked to be maps.

        Raises:
          KeyError: a network has no such tap.
          ValueError: a tap is no map, the numbers of taps differ or are below
            `at_least`, or a network has no stages and the user named no taps.
        """
        pairs = stage_pairs(
            specs,
            self._names(specs.student, self.student),
            self._names(specs.teacher, self.teacher),
        )
        for student_tap, teacher_tap in pairs:
            feature_map(specs.student, student_tap)
            feature_map(specs.teacher, teacher_tap)
        if len(pairs) < at_least:
            raise ValueError(
                f"this method compares consecutive layers and needs at least "
                f"{at_least} taps, got {', '.join(tap for tap, _ in pairs)}; set "
                f"student_taps and teacher_taps"
            )
        return pairs

    def maps(self, inputs: Inputs) -> list[tuple[jax.Array, jax.Array]]:
        """The arrays `(student's, teacher's)` under those names."""
        sides = (inputs.student, self.student), (inputs.teacher, self.teacher)
        arrays = (
            [outputs.taps[tap] for tap in self.read(outputs, taps)]
            for outputs, taps in sides
        )
        return list(zip(*arrays, strict=True))

    def read(self, outputs: Outputs, taps: Sequence[str] | None) -> Sequence[str]:
        """The names for one network's outputs."""
        return self._names(NetworkSpec.from_outputs("network", outputs), taps) or ()

    def _names(
        self, spec: NetworkSpec, taps: Sequence[str] | None
    ) -> Sequence[str] | None:
        # None, not an empty list, where a network has no stages: `stage_pairs` then
        # says which option to set.
        return taps if taps is not None else self.default(spec) or None


def describe_pair(specs: Specs, student_tap: str, teacher_tap: str) -> str:
    """Two taps with their networks and shapes, for messages."""
    student, teacher = specs.student, specs.teacher
    return (
        f"tap {student_tap!r} of student {student.name!r} has shape "
        f"{student.tap(student_tap)} and tap {teacher_tap!r} of teacher "
        f"{teacher.name!r} has {teacher.tap(teacher_tap)}"
    )


def total(values: Sequence[jax.Array]) -> jax.Array:
    """The sum over stages."""
    return sum(values[1:], values[0])
