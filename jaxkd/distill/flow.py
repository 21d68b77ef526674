"""Methods that compare how features change from one layer to the next."""

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
    no_state,
)
from jaxkd.distill.registry import register
from jaxkd.distill.stages import StageTaps, describe_pair, stem_and_stages, total
from jaxkd.losses.checks import check_positive


@register()
def fsp(
    *,
    factor: Scheduled = 50.0,
    student_taps: tuple[str, ...] | None = None,
    teacher_taps: tuple[str, ...] | None = None,
) -> Method:
    """How each layer's channels relate to the next layer's (Yim et al., 2017).

    The flow of the solution procedure between two layers is the matrix of inner
    products of their channels over the pixels:

        factor * sum over consecutive layers of mean (G_s - G_t)^2
        G_cd = mean over pixels of first_c second_d

    Needs: at least two taps of equal channels in student and teacher, layer by layer;
    the published method has no adapter, so networks of other widths are an error. Sizes
    are free: within a network the larger map is averaged down to the smaller one.

    Cost: one matrix product per pair of layers.

    Pitfalls: the matrices grow with the square of the activations, so networks without
    normalisation can make the value, and its gradient, very large.

    Paper and code: the method trains in two phases: first the student's layers by this
    loss alone (30 epochs in the benchmark's code), then the student by its labels
    without this loss. That is two stages of a run, with the parts `{"fsp": 1.0}` and
    `{"ce": 1.0}`.

    Published: CIFAR-100, 30 + 240 epochs: 69.95 for ResNet-20 from ResNet-56 (alone
    69.06, teacher 72.34), 72.91 for WRN-16-2 from WRN-40-2 (alone 73.26, teacher
    75.61); table of the CRD authors' benchmark.

    Args:
      factor: of the loss; a number or a schedule.
      student_taps: taps of the student in depth order; by default the stem, if there is
        one, and the ends of the stages.
      teacher_taps: taps of the teacher; likewise.

    Reference:
      Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network
      Minimization and Transfer Learning", CVPR 2017.
    """
    taps = StageTaps(
        student=student_taps, teacher=teacher_taps, default=stem_and_stages
    )

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        for s, t in taps.pairs(specs, at_least=2):
            if specs.student.tap(s)[-1] != specs.teacher.tap(t)[-1]:
                raise ValueError(
                    f"{describe_pair(specs, s, t)}; FSP needs equal channels, choose "
                    f"other networks or set student_taps and teacher_taps"
                )
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        maps = taps.maps(inputs)
        values = [
            losses.fsp((s, next_s), (t, next_t))
            for (s, t), (next_s, next_t) in zip(maps, maps[1:], strict=False)
        ]
        return {"fsp": total(values)}, memory

    return Method(init=init, terms=terms, weights={"fsp": factor}, num_teachers=1)


@register()
def kdsvd(
    *,
    vectors: int = 1,
    view: Literal["rows", "pixels"] = "rows",
    factor: Scheduled = 1.0,
    student_taps: tuple[str, ...] | None = None,
    teacher_taps: tuple[str, ...] | None = None,
) -> Method:
    """How each stage's singular vectors move to the next stage's (Lee et al., 2018).

    Each map is read as a matrix and reduced to its first right singular vectors. The
    student's are aligned with the teacher's, and the similarity of each entry of one
    stage with each of the stage before is compared:

        factor * sum over consecutive stages and entries of (R_s - R_t)^2
        R_abk = exp(-(v_i[a, k] - v_(i-1)[b, k])^2 / 8)

    Needs: at least two stages; at each, maps of one width in student and teacher
    (`view="rows"`) or of one number of channels (`view="pixels"`).

    Cost: a singular value decomposition of each map of each example, which is slow on
    accelerators.

    Pitfalls: singular vectors of nearly equal singular values turn with the slightest
    change of a map, and their gradient is large; see `losses.kdsvd` for where it is
    cut. Clip the gradients of the run.

    Paper and code: one benchmark's code (mdistiller) reads a map as `channels * height`
    rows of `width` entries, as by default here; another's (RepDistiller) as pixels by
    channels, which `view="pixels"` gives. The signs of singular vectors are arbitrary
    and enter the loss: the code takes those of its library, here the largest entry of
    each of the teacher's vectors is positive. So published values cannot be reproduced
    to the digit.

    Args:
      vectors: singular vectors of the teacher to compare; the student chooses from
        three more.
      view: which matrix a map is read as.
      factor: of the loss; a number or a schedule.
      student_taps: taps of the student; the ends of its stages by default.
      teacher_taps: taps of the teacher; likewise.

    Raises:
      ValueError: `vectors` is below 1.

    Reference:
      Lee, Kim, Song, "Self-supervised Knowledge Distillation Using Singular Value
      Decomposition", ECCV 2018.
    """
    check_positive("vectors", vectors)
    taps = StageTaps(student=student_taps, teacher=teacher_taps)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        axis = {"rows": 1, "pixels": 2}[view]
        for s, t in taps.pairs(specs, at_least=2):
            shapes = specs.student.tap(s), specs.teacher.tap(t)
            if shapes[0][axis] != shapes[1][axis]:
                raise ValueError(
                    f"{describe_pair(specs, s, t)}; KDSVD with view={view!r} needs "
                    f"one {('width', 'number of channels')[axis - 1]}"
                )
            most = min(_smallest_side(shape, view) for shape in shapes)
            if vectors > most:
                raise ValueError(
                    f"{describe_pair(specs, s, t)}; their matrices have {most} "
                    f"singular vectors, KDSVD is asked for {vectors}"
                )
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        students, teachers = zip(*taps.maps(inputs), strict=True)
        value = losses.kdsvd(students, teachers, vectors=vectors, view=view)
        return {"kdsvd": value}, memory

    return Method(init=init, terms=terms, weights={"kdsvd": factor}, num_teachers=1)


def _smallest_side(shape: tuple[int, ...], view: str) -> int:
    height, width, channels = shape
    if view == "rows":
        return min(channels * height, width)
    return min(height * width, channels)
