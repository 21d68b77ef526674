"""Methods that combine several teachers: by average, entropy or confidence."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxkd import losses
from jaxkd.distill.checks import check_same_logits, feature_map
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
from jaxkd.distill.modules import apply_module, init_module
from jaxkd.distill.registry import register
from jaxkd.distill.taps import last_stage
from jaxkd.layers import NetworkSpec, Outputs
from jaxkd.layers.connectors import ConvNorm
from jaxkd.losses.checks import check_positive
from jaxkd.losses.multi_teacher import check_shares
from jaxkd.numerics import adaptive_average_pool, resize_bilinear


@register()
def averaged_teachers(
    *,
    average: Literal["losses", "probabilities", "logits"] = "losses",
    temperature: Scheduled = 4.0,
    teacher_weights: tuple[float, ...] | None = None,
) -> Method:
    """The student matches the average of its teachers (You et al., 2017).

    The baseline of multi-teacher work, also called AVER:

        sum_i a_i * kd(student, teacher_i),    sum_i a_i = 1

    Averaging the teachers' softened probabilities instead differs by a constant only;
    averaging their logits takes the geometric mean of their distributions.

    Needs: logits of one shape from one or more teachers.

    Cost: a forward pass of every teacher.

    Pitfalls: at high temperature, teachers whose logits have a large range dominate the
    average of logits.

    Args:
      average: what is averaged.
      temperature: softens all distributions; a number or a schedule.
      teacher_weights: factors in the order of the teachers, scaled to sum to one; None
        for equal ones.

    Raises:
      ValueError: `temperature` is not positive, or the weights are no weights.

    Reference:
      You et al., "Learning from Multiple Teacher Networks", KDD 2017.
    """
    check_positive("temperature", temperature)
    if teacher_weights is not None:
        check_shares(teacher_weights)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        _check_logits("averaged_teachers", specs)
        if teacher_weights and len(teacher_weights) != len(specs.teachers):
            raise ValueError(
                f"teacher_weights has {len(teacher_weights)} numbers for "
                f"{len(specs.teachers)} teachers"
            )
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        student, now = inputs.student.logits, inputs.at(temperature)
        teachers = [teacher.logits for teacher in inputs.teachers]
        if average == "losses":
            value = losses.averaged_kd(
                student, teachers, shares=teacher_weights, temperature=now
            )
        elif average == "probabilities":
            teacher = losses.averaged_probabilities(
                teachers, shares=teacher_weights, temperature=now
            )
            value = losses.kd(student, teacher, temperature=now)
        else:
            teacher = losses.averaged_logits(teachers, shares=teacher_weights)
            value = losses.kd(student, teacher, temperature=now)
        return {"averaged_teachers": value}, memory

    return Method(
        init=init,
        terms=terms,
        weights={"averaged_teachers": 1.0},
        num_teachers="many",
    )


@register()
def ebkd(*, temperature: Scheduled = 4.0) -> Method:
    """Teachers count by the certainty of each prediction (Kwon et al., 2020).

        sum_i (1 - H_i / sum_j H_j) * kd(student, teacher_i) / n

    per example, with the entropies H of the unsoftened predictions.

    Needs: logits of one shape from two or more teachers. Labels are not read.

    Cost: a forward pass of every teacher.

    Pitfalls: a teacher that is certain and wrong counts most; `camkd` asks the labels.

    Paper and code: the form is that of the repository of CA-MKD, where the weights sum
    to n - 1 and the sum is divided by n.

    Args:
      temperature: softens the distributions of `kd`; a number or a schedule.

    Raises:
      ValueError: `temperature` is not positive.

    Reference:
      Kwon et al., "Adaptive Knowledge Distillation Based on Entropy", ICASSP 2020.
    """
    check_positive("temperature", temperature)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        _check_logits("ebkd", specs, least=2)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        value = losses.ebkd(
            inputs.student.logits,
            [teacher.logits for teacher in inputs.teachers],
            temperature=inputs.at(temperature),
        )
        return {"ebkd": value}, memory

    return Method(init=init, terms=terms, weights={"ebkd": 1.0}, num_teachers="many")


@register()
def camkd(
    *,
    temperature: Scheduled = 4.0,
    alpha: Scheduled = 1.0,
    beta: Scheduled = 50.0,
    hint_weights: Literal["teacher", "projected"] = "teacher",
    student_tap: str | None = None,
    teacher_taps: tuple[str, ...] | None = None,
) -> Method:
    """Teachers count by how right they are on each example (Zhang et al., 2022).

    Predictions and last feature maps are matched with weights per teacher and example,

        w_i = (1 - softmax_i(CE_i)) / (n - 1)
        alpha * sum_i w_i kd_i / n + beta * sum_i w_i mean((c_i(f) - f_i)^2) / n

    where CE_i is the cross-entropy of teacher i with the label, f and f_i are the maps
    of student and teacher, and c_i is a 1x1 convolution with batch norm and ReLU.

    Needs: logits of one shape and a map from each of two or more teachers, and labels.
    The student's map is brought to the size of each teacher's, by average pooling if
    it is larger, else by interpolation. `hint_weights="projected"` also needs the
    teachers' last linear layers. Compose with `ce` at weight 1.

    Cost: a forward pass of every teacher, and one 1x1 convolution per teacher, which
    is dropped after training.

    Pitfalls: the factor 1/n comes on top of weights that sum to one, so that terms
    shrink as teachers are added.

    Paper and code: the trainer computes the weights of the maps not from the teachers'
    predictions but from what their classifiers make of the student's projected map,
    and lets a gradient pass through these weights: `hint_weights="projected"`. It also
    leaves the term `hint` out in the first epoch, which a schedule for `beta` can do.

    Args:
      temperature: softens the distributions of `kd`; a number or a schedule.
      alpha: factor of the term `kd`.
      beta: factor of the term `hint`.
      hint_weights: whose predictions weigh the maps, see above.
      student_tap: the student's map; None takes its last stage.
      teacher_taps: the teachers' maps in their order; None takes their last stages.

    Raises:
      ValueError: `temperature` is not positive.

    Reference:
      Zhang, Chen, Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation",
      ICASSP 2022.
    """
    check_positive("temperature", temperature)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        _check_logits("camkd", specs, least=2)
        student = last_stage(specs.student, student_tap)
        _, _, channels = feature_map(specs.student, student)
        params, memory = {}, {}
        taps = _teacher_taps(specs.teachers, teacher_taps)
        for i, (teacher, tap) in enumerate(zip(specs.teachers, taps, strict=True)):
            height, width, features = feature_map(teacher, tap)
            if hint_weights == "projected":
                _check_head(teacher, tap)
            name = f"teacher{i}"
            params[name], memory[name] = init_module(
                ConvNorm(features, relu=True),
                jax.random.fold_in(key, i),
                (height, width, channels),
            )
        return params, memory

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        spec = NetworkSpec.from_outputs("student", inputs.student)
        map_ = inputs.student.taps[last_stage(spec, student_tap)]
        taps = _teacher_taps(
            [NetworkSpec.from_outputs("teacher", t) for t in inputs.teachers],
            teacher_taps,
        )
        maps = [t.taps[tap] for t, tap in zip(inputs.teachers, taps, strict=True)]
        projected, new_memory = [], {}
        for i, target in enumerate(maps):
            name = f"teacher{i}"
            resized = _resize(map_, (target.shape[1], target.shape[2]))
            output, new_memory[name] = apply_module(
                ConvNorm(target.shape[3], relu=True),
                params[name],
                memory[name],
                resized,
                train=True,
            )
            projected.append(output)
        logits = [teacher.logits for teacher in inputs.teachers]
        if hint_weights == "projected":
            judged = [
                _classify(teacher, x)
                for teacher, x in zip(inputs.teachers, projected, strict=True)
            ]
        else:
            judged = [jax.lax.stop_gradient(z) for z in logits]
        weights = losses.confidence_weights(judged, inputs.targets)
        return {
            "kd": losses.camkd(
                inputs.student.logits,
                logits,
                inputs.targets,
                temperature=inputs.at(temperature),
            ),
            "hint": losses.weighted_hint(projected, maps, weights),
        }, new_memory

    return Method(
        init=init,
        terms=terms,
        weights={"kd": alpha, "hint": beta},
        num_teachers="many",
    )


def _check_logits(method: str, specs: Specs, least: int = 1) -> None:
    if len(specs.teachers) < least:
        raise ValueError(
            f"method {method!r} needs at least {least} teachers, the stage names "
            f"{len(specs.teachers)}"
        )
    for teacher in specs.teachers or (specs.teacher,):
        check_same_logits(specs.student, teacher)


def _teacher_taps(teachers, taps: tuple[str, ...] | None) -> list[str]:
    if taps is not None and len(taps) != len(teachers):
        raise ValueError(
            f"teacher_taps names {len(taps)} taps ({', '.join(taps)}) for "
            f"{len(teachers)} teachers"
        )
    return [
        last_stage(teacher, None if taps is None else taps[i], option="teacher_taps")
        for i, teacher in enumerate(teachers)
    ]


def _check_head(teacher: NetworkSpec, tap: str) -> None:
    channels = teacher.tap(tap)[-1:]
    if not teacher.has_head or teacher.taps.get("pooled") != channels:
        raise ValueError(
            f"teacher {teacher.name!r} has no linear layer on its pooled tap {tap!r}; "
            f"set hint_weights to 'teacher'"
        )


def _resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    if x.shape[1] >= size[0] and x.shape[2] >= size[1]:
        return adaptive_average_pool(x, size)
    return resize_bilinear(x, size)


def _classify(teacher: Outputs, x: jax.Array) -> jax.Array:
    """What the teacher's last layer makes of a map in the place of its own."""
    head = jax.lax.stop_gradient(teacher.head)
    pooled = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    product = jnp.matmul(pooled, head["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + head["bias"][None]
