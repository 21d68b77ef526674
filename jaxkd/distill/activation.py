"""Methods that compare stages before their last ReLU, behind learned connectors."""

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
)
from jaxkd.distill.modules import apply_module, init_module
from jaxkd.distill.registry import register
from jaxkd.distill.stages import StageTaps, stages_before_relu, total
from jaxkd.layers import kaiming_normal
from jaxkd.layers.connectors import ConvNorm, shrink_to
from jaxkd.losses.checks import check_positive


@register()
def ab(
    *,
    margin: float = 1.0,
    connector: Literal["always", "where_needed"] = "always",
    factor: Scheduled = 0.003,
    student_taps: tuple[str, ...] | None = None,
    teacher_taps: tuple[str, ...] | None = None,
) -> Method:
    """On which side of zero each neuron is (activation boundaries; Heo et al., 2019).

    The student's values before a ReLU are pushed beyond a margin on the side on which
    the teacher's are:

        factor * sum over stages i of 2^(i - n) *
            sum over pixels and channels of  max(m + s, 0)^2  where t <= 0
                                             max(m - s, 0)^2  where t > 0

    for stages i = 1..n, so that the last counts fully and each one before it half.

    Needs: the value of each stage before its last ReLU in both networks, in equal
    number. A connector (1x1 convolution and batch norm, trained with the student) gives
    each student map the teacher's channels; where sizes differ, the larger map is
    averaged down to the smaller one.

    Cost: one small matrix product per stage.

    Pitfalls: the value is a sum over all neurons, so it grows with the networks and the
    image size, and the factor with it. Only signs are taught: the method makes a
    starting point, not a classifier.

    Paper and code: the method trains in two phases: first by this loss alone (30
    epochs), then by the labels, with or without `kd`. That is two stages of a run, with
    the parts `{"ab": 1.0}` and `{"ce": 1.0}`. The benchmark's code has no connector
    where student and teacher have one shape, which `connector="where_needed"` gives,
    and FitNet's regressors where sizes differ, instead of the averaging here. Its
    factor 3/1000 is the default of `factor`.

    Published: CIFAR-100, 30 + 240 epochs: 69.47 for ResNet-20 from ResNet-56 (alone
    69.06, teacher 72.34), 73.55 for ShuffleNetV1 from ResNet-32x4 (alone 70.50, teacher
    79.42); table of the CRD authors' benchmark.

    Args:
      margin: the distance m.
      connector: `"always"`, or only `"where_needed"`: for unequal shapes.
      factor: of the loss; a number or a schedule.
      student_taps: taps of the student; by default those before the last ReLU of each
        stage.
      teacher_taps: taps of the teacher; likewise.

    Raises:
      ValueError: `margin` is not positive.

    Reference:
      Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed
      by Hidden Neurons", AAAI 2019.
    """
    check_positive("margin", margin)
    taps = StageTaps(
        student=student_taps, teacher=teacher_taps, default=stages_before_relu
    )

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        params, memory = {}, {}
        for i, (s, t) in enumerate(taps.pairs(specs)):
            source, goal = specs.student.tap(s), specs.teacher.tap(t)
            if connector == "always" or source != goal:
                params[_name(i)], memory[_name(i)] = init_module(
                    _connector(goal[-1]), jax.random.fold_in(key, i), source
                )
        return params, memory

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        maps, values, new_memory = taps.maps(inputs), [], dict(memory)
        for i, (s, t) in enumerate(maps):
            s, t = shrink_to(s, t.shape[1:3]), shrink_to(t, s.shape[1:3])
            if _name(i) in params:
                s, new_memory[_name(i)] = _connect(params, memory, i, s, t)
            values.append(_stage_weight(i, maps) * losses.ab(s, t, margin=margin))
        return {"ab": total(values)}, new_memory

    return Method(init=init, terms=terms, weights={"ab": factor}, num_teachers=1)


@register()
def ofd(
    *,
    factor: Scheduled = 0.001,
    student_taps: tuple[str, ...] | None = None,
    teacher_taps: tuple[str, ...] | None = None,
) -> Method:
    """Each stage before its last ReLU, as far as the ReLU lets it through.

    "A comprehensive overhaul of feature distillation" (Heo et al., 2019). Where the
    teacher is positive the student copies it; where it is negative, the student only
    has to be as negative as the teacher, or as the margin `m`, the expected value of
    that channel's negative responses:

        factor * sum over stages i of 2^(i - n) *
            sum over pixels and channels of (s - max(t, m))^2
            (but 0 where t <= 0 and s <= max(t, m))

    for stages i = 1..n, so that the last counts fully and each one before it half.

    Needs: the value of each stage before its last ReLU in both networks, in equal
    number, and the batch norm that made the teacher's (its scale and bias give the
    margin). A connector (1x1 convolution and batch norm, trained with the student)
    gives each student map the teacher's channels; the teacher's map is averaged to the
    student's size.

    Cost: one small matrix product per stage.

    Pitfalls: the value is a sum over all neurons, so it grows with the networks and the
    image size; the default factor is one for CIFAR. In a residual network the batch
    norm is only the residual branch's, as in the published code: its shortcut does not
    enter the margin.

    Paper and code: averaging the teacher to the student's size is the benchmark's
    (mdistiller's) addition.

    Args:
      factor: of the loss; a number or a schedule.
      student_taps: taps of the student; by default those before the last ReLU of each
        stage.
      teacher_taps: taps of the teacher; likewise. The teacher's outputs must hold the
        batch norm of each.

    Reference:
      Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019.
    """
    taps = StageTaps(
        student=student_taps, teacher=teacher_taps, default=stages_before_relu
    )

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        params, memory = {}, {}
        for i, (s, t) in enumerate(taps.pairs(specs)):
            teacher = specs.teacher
            if t not in teacher.norms:
                raise ValueError(
                    f"OFD takes its margins from the batch norm of tap {t!r}, which "
                    f"network {teacher.name!r} does not give; it gives those of "
                    f"{', '.join(teacher.norms) or 'none'}"
                )
            params[_name(i)], memory[_name(i)] = init_module(
                _connector(teacher.tap(t)[-1]),
                jax.random.fold_in(key, i),
                specs.student.tap(s),
            )
        return params, memory

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        maps, values, new_memory = taps.maps(inputs), [], dict(memory)
        names = taps.read(inputs.teacher, teacher_taps)
        for i, ((s, t), name) in enumerate(zip(maps, names, strict=True)):
            s, new_memory[_name(i)] = _connect(params, memory, i, s, t)
            norm = inputs.teacher.norms[name]
            margin = losses.ofd_margin(norm["scale"], norm["bias"])
            values.append(_stage_weight(i, maps) * losses.ofd(s, t, margin))
        return {"ofd": total(values)}, new_memory

    return Method(init=init, terms=terms, weights={"ofd": factor}, num_teachers=1)


def _name(stage: int) -> str:
    return f"connector{stage + 1}"


def _connector(channels: int) -> ConvNorm:
    return ConvNorm(channels, kernel_init=kaiming_normal)


def _connect(
    params: Params, memory: Memory, stage: int, student: jax.Array, teacher: jax.Array
) -> tuple[jax.Array, Memory]:
    """The student's map with the teacher's channels, and the connector's memory."""
    name = _name(stage)
    module = _connector(teacher.shape[-1])
    return apply_module(module, params[name], memory[name], student, train=True)


def _stage_weight(stage: int, maps: list[tuple[jax.Array, jax.Array]]) -> float:
    return 2.0 ** (stage + 1 - len(maps))
