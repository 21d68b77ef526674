"""Baselines of HLFD's comparison, as its code computes them, and EMKD.

All take the taps `e1..e5, d5..d2, out` of the segmentation networks and are used
beside a task loss: `weighted({"focal_dice": 1.0, "hifd": 1.0})`. The prefix `seg_`
keeps names apart from the classification methods whose formulas differ.
"""

from __future__ import annotations

from typing import Literal

import jax

from jaxkd import losses
from jaxkd.distill.checks import (
    check_same_logits,
    check_segmentation,
    feature_map,
)
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Specs,
    Terms,
    Weight,
    no_state,
)
from jaxkd.distill.projections import Projection
from jaxkd.distill.registry import register
from jaxkd.distill.transfers import Settings, Transfer, transfer_method
from jaxkd.losses.checks import check_positive


def _same(*taps: str) -> list[Transfer]:
    """Each student layer from the teacher's layer of the same name."""
    return [Transfer(student=(tap,), teacher=(tap,)) for tap in taps]


def _from(teacher: str, *students: str) -> list[Transfer]:
    """Each student layer from one teacher layer."""
    return [Transfer(student=(tap,), teacher=(teacher,)) for tap in students]


def _settings(
    exponent: int,
    temperature: float,
    projection: Projection,
    pmd_norm: Literal["code", "pixel"],
) -> Settings:
    return Settings(
        exponent=exponent,
        temperature=temperature,
        projection=projection,
        pmd_norm=pmd_norm,
    )


@register()
def seg_at(*, exponent: int = 4) -> Method:
    """Attention transfer of the deepest encoder layer: `IMD(e5, e5)`.

    Args:
      exponent: even power of the importance maps.
    """
    return transfer_method(
        "seg_at",
        importance=_same("e5"),
        weights={"flfd": 1.0},
        settings=Settings(exponent=exponent),
    )


@register()
def seg_skd(
    *,
    alpha: Weight = 0.1,
    beta: Weight = 0.9,
    exponent: int = 4,
    temperature: float = 4.0,
    projection: Projection = "resample",
    pmd_norm: Literal["code", "pixel"] = "code",
) -> Method:
    """Last layers only, no feedback: `IMD(e5, e5)` and `PMD(out, out)`.

    Args:
      alpha: weight of the term `plfd`.
      beta: weight of the term `flfd`.
      exponent: even power of the importance maps.
      temperature: of the prediction maps.
      projection: see `hlfd`; the code projects equal classes as well.
      pmd_norm: see `hlfd`.
    """
    return transfer_method(
        "seg_skd",
        importance=_same("e5"),
        prediction=_same("out"),
        weights={"flfd": beta, "plfd": alpha},
        settings=_settings(exponent, temperature, projection, pmd_norm),
    )


@register()
def seg_deep(
    *,
    alpha: Weight = 0.1,
    beta: Weight = 0.9,
    exponent: int = 4,
    temperature: float = 4.0,
    projection: Projection = "resample",
    pmd_norm: Literal["code", "pixel"] = "code",
) -> Method:
    """Every layer from the same layer of the teacher (the code's "deep KD").

    `IMD(e_i, e_i)` for i = 1..5; `PMD(out, out)`, `PMD(d_i, d_i)` for i = 4, 3, 2, and
    `PMD(s_d5, s_d5)`: the code compares the student's d5 with itself, presumably a
    slip, and with a gradient on both sides. We keep it.

    Args:
      alpha: weight of the term `plfd`.
      beta: weight of the term `flfd`.
      exponent: even power of the importance maps.
      temperature: of the prediction maps.
      projection: see `hlfd`.
      pmd_norm: see `hlfd`.
    """
    itself = Transfer(kind="itself", student=("d5",), teacher=())
    return transfer_method(
        "seg_deep",
        importance=_same("e1", "e2", "e3", "e4", "e5"),
        prediction=[*_same("out", "d4", "d3", "d2"), itself],
        weights={"flfd": beta, "plfd": alpha},
        settings=_settings(exponent, temperature, projection, pmd_norm),
    )


@register()
def hifd(
    *,
    alpha: Weight = 0.1,
    beta: Weight = 0.9,
    exponent: int = 4,
    temperature: float = 4.0,
    projection: Projection = "resample",
    pmd_norm: Literal["code", "pixel"] = "code",
) -> Method:
    """Feedback by individual transfers only.

    `IMD(e5, e5) + IMD(s_e2, t_e5) + IMD(s_e4, t_e5)` and
    `PMD(out, out) + PMD(s_d4, t_out) + PMD(s_d2, t_out)`.

    Args:
      alpha: weight of the term `plfd`.
      beta: weight of the term `flfd`.
      exponent: even power of the importance maps.
      temperature: of the prediction maps.
      projection: see `hlfd`.
      pmd_norm: see `hlfd`.
    """
    return transfer_method(
        "hifd",
        importance=_from("e5", "e5", "e2", "e4"),
        prediction=_from("out", "out", "d4", "d2"),
        weights={"flfd": beta, "plfd": alpha},
        settings=_settings(exponent, temperature, projection, pmd_norm),
    )


@register()
def ifd(
    *,
    alpha: Weight = 0.1,
    beta: Weight = 0.9,
    exponent: int = 4,
    temperature: float = 4.0,
    projection: Projection = "resample",
    pmd_norm: Literal["code", "pixel"] = "code",
) -> Method:
    """Feedback to the concatenation of the student's layers.

    `IMD(e5, e5) + IMD([s_e1..s_e4], t_e5)` and
    `PMD(out, out) + PMD([s_d5..s_d2], t_out)`.

    Args:
      alpha: weight of the term `plfd`.
      beta: weight of the term `flfd`.
      exponent: even power of the importance maps.
      temperature: of the prediction maps.
      projection: see `hlfd`.
      pmd_norm: see `hlfd`.
    """

    def concatenated(teacher: str, *students: str) -> Transfer:
        return Transfer(kind="concatenated", student=students, teacher=(teacher,))

    return transfer_method(
        "ifd",
        importance=[*_same("e5"), concatenated("e5", "e1", "e2", "e3", "e4")],
        prediction=[*_same("out"), concatenated("out", "d5", "d4", "d3", "d2")],
        weights={"flfd": beta, "plfd": alpha},
        settings=_settings(exponent, temperature, projection, pmd_norm),
    )


@register()
def emkd(
    *,
    alpha: Weight = 0.1,
    beta: Weight = 0.9,
    gamma: Weight = 0.9,
    exponent: int = 4,
    temperature: float = 4.0,
    low: str = "e2",
    high: str = "e5",
) -> Method:
    """EMKD: prediction maps, importance maps and region affinity of two layers.

    `PMD(out, out)` here has no projection. `region` reads the mask from the labels:
    every class but the background is foreground.

    Args:
      alpha: weight of the term `prediction`.
      beta: weight of the term `importance`, the sum over both layers.
      gamma: weight of the term `region`, the sum over both layers.
      exponent: even power of the importance maps.
      temperature: of the prediction maps.
      low: tap of a shallow encoder layer, in both networks.
      high: tap of a deep encoder layer, in both networks.

    Raises:
      ValueError: `temperature` or `exponent` is impossible.

    Reference:
      Qin et al., "Efficient Medical Image Segmentation Based on Knowledge
      Distillation", IEEE TMI 2021.
    """
    check_positive("temperature", temperature)
    Settings(exponent=exponent)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        student, teacher = specs.student, specs.teacher
        check_segmentation("emkd", student)
        check_same_logits(student, teacher)
        for network in (student, teacher):
            for tap in (low, high):
                feature_map(network, tap)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        student, teacher = inputs.student, inputs.teacher
        foreground = inputs.labels > 0
        pairs = [(student.taps[tap], teacher.taps[tap]) for tap in (low, high)]
        importance = [
            losses.importance_map_distillation(s, t, exponent=exponent)
            for s, t in pairs
        ]
        region = [losses.region_affinity(s, t, foreground) for s, t in pairs]
        values = {
            "prediction": losses.prediction_map_distillation(
                student.logits, teacher.logits, temperature=temperature
            ),
            "importance": importance[0] + importance[1],
            "region": region[0] + region[1],
        }
        return values, memory

    weights = {"prediction": alpha, "importance": beta, "region": gamma}
    return Method(init=init, terms=terms, weights=weights, num_teachers=1)
