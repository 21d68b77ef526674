"""HLFD: Hierarchical Layer-selective Feedback Distillation.

The teacher's middle layers teach the student's first layer, its last layers teach the
student's middle layers: on importance maps of encoder features (FLFD) and on softened
prediction maps (PLFD).
"""

from __future__ import annotations

from typing import Literal

from jaxkd.distill.method import Method, Weight
from jaxkd.distill.projections import Projection
from jaxkd.distill.registry import register
from jaxkd.distill.transfers import Settings, Transfer, transfer_method


@register()
def hlfd(
    *,
    alpha: Weight = 0.1,
    beta: Weight = 0.9,
    exponent: int = 4,
    temperature: float = 4.0,
    projection: Projection = "resample",
    pmd_norm: Literal["code", "pixel"] = "code",
    student_first: str = "e1",
    student_encoder: tuple[str, ...] = ("e2", "e3", "e4"),
    student_deepest: str = "d5",
    student_decoder: tuple[str, ...] = ("d4", "d3", "d2"),
    teacher_encoder: tuple[str, ...] = ("e2", "e3", "e4"),
    teacher_last: str = "e5",
    teacher_decoder: tuple[str, ...] = ("d5", "d4", "d3"),
    teacher_output: str = "out",
) -> Method:
    """HLFD as its code computes it.

        FLFD = 1/2 IMD_uni(s_e1, [t_e2, t_e3, t_e4])
             + 1/2 (IMD(s_e2, t_e5) + IMD(s_e3, t_e5) + IMD(s_e4, t_e5))
        PLFD = 1/2 PMD_uni(s_d5, [t_d5, t_d4, t_d3])
             + 1/2 (PMD(s_d4, t_out) + PMD(s_d3, t_out) + PMD(s_d2, t_out))

    Terms `flfd` (weight beta) and `plfd` (weight alpha); the task loss is added by
    `weighted({"focal_dice": 1.0, "hlfd": 1.0})`.

    Args:
      alpha: weight of `plfd`; a number or a schedule.
      beta: weight of `flfd`; a number or a schedule.
      exponent: even power of the importance maps.
      temperature: of the prediction maps.
      projection: `"resample"` draws the 1x1 projections anew at each step, as the
        code does; `"fixed"` draws them once; `"learned"` trains them with the student.
      pmd_norm: `"code"` divides prediction maps by `h w channels / 2`, `"pixel"` by
        `h w`.
      student_first: student tap that learns from `teacher_encoder`, unified.
      student_encoder: student taps that each learn from `teacher_last`.
      student_deepest: student tap that learns from `teacher_decoder`, unified.
      student_decoder: student taps that each learn from `teacher_output`.
      teacher_encoder: middle encoder taps of the teacher.
      teacher_last: last encoder tap of the teacher.
      teacher_decoder: decoder taps of the teacher.
      teacher_output: prediction tap of the teacher, at least 2 channels.

    Raises:
      ValueError: an option is impossible, or the teacher's taps are empty.

    Reference:
      Gorade et al., "Rethinking Intermediate Layers design in Knowledge Distillation
      for Kidney and Liver Tumor Segmentation", ISBI 2024.
    """
    settings = Settings(
        exponent=exponent,
        temperature=temperature,
        projection=projection,
        pmd_norm=pmd_norm,
    )

    def unified(student: str, teachers: tuple[str, ...]) -> Transfer:
        return Transfer(
            kind="unified", student=(student,), teacher=tuple(teachers), factor=0.5
        )

    def individual(student: str, teacher: str) -> Transfer:
        return Transfer(student=(student,), teacher=(teacher,), factor=0.5)

    return transfer_method(
        "hlfd",
        importance=[
            unified(student_first, teacher_encoder),
            *(individual(tap, teacher_last) for tap in student_encoder),
        ],
        prediction=[
            unified(student_deepest, teacher_decoder),
            *(individual(tap, teacher_output) for tap in student_decoder),
        ],
        weights={"flfd": beta, "plfd": alpha},
        settings=settings,
    )
