"""Methods made of map transfers between named layers: HLFD and its relatives.

A method is two lists of `Transfer`: importance maps (the FLFD part) and prediction maps
(the PLFD part). One student layer and one teacher layer make an individual transfer,
several teacher layers a unified one, several student layers a concatenated one.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Literal

import jax

from jaxkd import losses
from jaxkd.distill import projections
from jaxkd.distill.checks import feature_map
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Specs,
    Terms,
    Weight,
)
from jaxkd.layers import NetworkSpec, Outputs
from jaxkd.losses.checks import check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """Which student layers learn from which teacher layers, by how much.

    Attributes:
      kind: `"individual"` (one layer from one), `"unified"` (one from several),
        `"concatenated"` (several from one), or `"itself"` (one layer from itself, both
        sides with a gradient).
      student: student taps.
      teacher: teacher taps; none for `"itself"`.
      factor: share of this transfer in its part.
    """

    kind: Literal["individual", "unified", "concatenated", "itself"] = "individual"
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    factor: float = 1.0

    def __post_init__(self) -> None:
        several = (self.kind == "concatenated", self.kind == "unified")
        for side, taps, many in zip(
            ("student", "teacher"), (self.student, self.teacher), several, strict=True
        ):
            expected = 0 if side == "teacher" and self.kind == "itself" else 1
            if not taps and expected or len(taps) > expected and not many:
                raise ValueError(
                    f"the {self.kind} transfer needs "
                    f"{'one or more' if many else expected} {side} taps, got {taps}"
                )

    @property
    def name(self) -> str:
        """The student's side, which names the projection."""
        return "_".join(self.student)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How maps are compared; the options that HLFD and its baselines share.

    Attributes:
      exponent: the even power of the importance maps.
      temperature: of the prediction maps.
      projection: where the 1x1 projections come from.
      pmd_norm: divisor of the prediction maps, see
        `losses.prediction_map_distillation`.
    """

    exponent: int = 4
    temperature: float = 4.0
    projection: projections.Projection = "resample"
    pmd_norm: Literal["code", "pixel"] = "code"

    def __post_init__(self) -> None:
        if self.exponent < 2 or self.exponent % 2:
            raise ValueError(
                f"exponent must be a positive even integer, got {self.exponent}"
            )
        check_positive("temperature", self.temperature)
        for option, kinds in {
            "projection": typing.get_args(projections.Projection),
            "pmd_norm": ("code", "pixel"),
        }.items():
            if getattr(self, option) not in kinds:
                raise ValueError(
                    f"{option} must be one of {', '.join(kinds)}, "
                    f"got {getattr(self, option)!r}"
                )


def transfer_method(
    name: str,
    *,
    importance: Sequence[Transfer] = (),
    prediction: Sequence[Transfer] = (),
    weights: Mapping[str, Weight],
    settings: Settings,
) -> Method:
    """Makes the method that sums importance and prediction transfers.

    Args:
      name: of the method, for messages.
      importance: transfers of the term `flfd`.
      prediction: transfers of the term `plfd`.
      weights: factor of `flfd` and of `plfd`, where the method has them.
      settings: how maps are compared.

    Raises:
      ValueError: two prediction transfers end at the same student layers, which would
        share a projection.
    """
    targets = [transfer.name for transfer in prediction]
    if len(set(targets)) != len(targets):
        raise ValueError(
            f"prediction transfers of {name!r} must end at different student layers, "
            f"got {', '.join(targets)}"
        )

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        student, teacher = specs.student, specs.teacher
        for transfer in (*importance, *prediction):
            for tap in transfer.student:
                feature_map(student, tap)
            for tap in transfer.teacher:
                feature_map(teacher, tap)
        widths = _widths(prediction, student, teacher)
        for target, (_, width) in widths.items():
            if width < 2:
                raise ValueError(
                    f"the prediction transfer to {target!r} compares maps of "
                    f"{width} channel, whose softmax is constant; it needs at least 2"
                )
        return projections.init(settings.projection, key, widths)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        student, teacher = inputs.student, inputs.teacher
        values = {}
        if importance:
            parts = [
                transfer.factor * _importance(transfer, student, teacher, settings)
                for transfer in importance
            ]
            values["flfd"] = sum(parts[1:], parts[0])
        if prediction:
            widths = _widths(
                prediction,
                NetworkSpec.from_outputs("student", student),
                NetworkSpec.from_outputs("teacher", teacher),
            )
            drawn = projections.current(
                settings.projection, params, memory, inputs.key, widths
            )
            parts = [
                transfer.factor
                * _prediction(
                    transfer, student, teacher, drawn[transfer.name], settings
                )
                for transfer in prediction
            ]
            values["plfd"] = sum(parts[1:], parts[0])
        return values, memory

    return Method(init=init, terms=terms, weights=dict(weights), num_teachers=1)


def _importance(
    transfer: Transfer, student: Outputs, teacher: Outputs, settings: Settings
) -> jax.Array:
    students = [student.taps[tap] for tap in transfer.student]
    teachers = [teacher.taps[tap] for tap in transfer.teacher]
    if transfer.kind == "unified":
        return losses.unified_importance_map_distillation(
            students[0], teachers, exponent=settings.exponent
        )
    return losses.concatenated_importance_map_distillation(
        students, teachers[0], exponent=settings.exponent
    )


def _prediction(
    transfer: Transfer,
    student: Outputs,
    teacher: Outputs,
    projection: Mapping[str, jax.Array],
    settings: Settings,
) -> jax.Array:
    students = [student.taps[tap] for tap in transfer.student]
    teachers = [teacher.taps[tap] for tap in transfer.teacher]
    kernel, bias = projection["kernel"], projection["bias"]
    options = {"temperature": settings.temperature, "norm": settings.pmd_norm}
    if transfer.kind == "unified":
        return losses.unified_prediction_map_distillation(
            students[0], teachers, kernel, bias, **options
        )
    if transfer.kind == "itself":
        target = student.taps[transfer.student[0]]
        projected = losses.project(students, kernel, bias)
        return losses.prediction_map_divergence(projected, target, **options)
    return losses.concatenated_prediction_map_distillation(
        students, teachers[0], kernel, bias, **options
    )


def _widths(
    prediction: Sequence[Transfer], student: NetworkSpec, teacher: NetworkSpec
) -> dict[str, tuple[int, int]]:
    """Input and output channels of the projection of each prediction transfer."""
    widths = {}
    for transfer in prediction:
        of_student = [student.tap(tap)[-1] for tap in transfer.student]
        of_teacher = [teacher.tap(tap)[-1] for tap in transfer.teacher] or of_student
        if transfer.kind == "unified":
            widths[transfer.name] = (sum(of_teacher), of_student[0])
        else:
            widths[transfer.name] = (sum(of_student), of_teacher[0])
    return widths
