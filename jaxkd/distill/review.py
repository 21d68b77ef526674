"""ReviewKD: deep features of the student, fused with shallow ones, teach all stages."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxkd import losses
from jaxkd.distill.checks import feature_map
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
from jaxkd.distill.taps import Networks, networks, pooled, stage_pairs
from jaxkd.layers import NetworkSpec
from jaxkd.layers.connectors import Review


@register()
def reviewkd(
    *,
    student_taps: tuple[str, ...] | None = None,
    teacher_taps: tuple[str, ...] | None = None,
    factor: Scheduled = 5.0,
    warmup_epochs: int = 20,
    mid_channels: int | None = None,
) -> Method:
    """Every stage of the teacher is reviewed by deeper stages (Chen et al., 2021).

    The student's maps are fused one after the other, from the deepest to the
    shallowest, with learned attention between a map and what the deeper ones hand on.
    Each fused map is led to the teacher's width by a 3x3 convolution and compared with
    the teacher's map of that depth at several resolutions.

        sum over stages of hierarchical_context(fused, teacher)

    The usual recipe is `weighted({"ce": 1.0, "reviewkd": 1.0})`.

    Needs: as many maps of the student as of the teacher, by default all stages, and the
    tap "pooled" of both, which is a last map of 1x1 pixels. Where sizes differ the
    fused map is resized (nearest) to the teacher's.

    Cost: a 1x1 and a 3x3 convolution of up to 512 channels per stage, on the student's
    maps: for a small student much more than the rest of the losses.

    Pitfalls: `factor` differs by pair: 5 for resnet32x4 and resnet8x4, 1 for ResNet-34
    and ResNet-18, 8 for ResNet-50 and MobileNet.

    Paper and code: as in the code, the teacher's maps are those before the last ReLU of
    a stage ("stage1_pre", ...) where the network has such taps, and the student's are
    those after it; name the taps for another choice. The term as it is logged includes
    the warm-up, `min((epoch + 1) / warmup_epochs, 1)` with epochs counted from 0.

    Args:
      student_taps: maps of the student from the shallowest to the deepest, without
        "pooled"; None takes its stages.
      teacher_taps: maps of the teacher; None takes its stages, before their last ReLU
        if possible.
      factor: weight of the term.
      warmup_epochs: epochs until the term has its full weight; 0 for none.
      mid_channels: channels that the fusions hand on; None takes those of the student's
        "pooled", at most 512.

    Raises:
      ValueError: `warmup_epochs` is negative or `mid_channels` below 1.

    Reference:
      Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021.
    """
    if warmup_epochs < 0:
        raise ValueError(f"warmup_epochs must be >= 0, got {warmup_epochs}")
    if mid_channels is not None and mid_channels < 1:
        raise ValueError(f"mid_channels must be >= 1, got {mid_channels}")

    def plan(found: Specs | Networks) -> tuple[list[tuple[str, str]], Review]:
        """Pairs of taps, the pooled vectors last, and the module between them."""
        student, teacher = found.student, found.teacher
        vectors = (
            pooled(student, option="student_taps"),
            pooled(teacher, option="teacher_taps"),
        )
        pairs = stage_pairs(found, student_taps, teacher_taps)
        if teacher_taps is None:
            pairs = [(source, _before_relu(teacher, goal)) for source, goal in pairs]
        for source, _ in pairs:
            feature_map(student, source)
        goals = [feature_map(teacher, goal) for _, goal in pairs]
        sizes = [goal[:2] for goal in goals]
        widths = [goal[-1] for goal in goals]
        (width,) = student.tap(vectors[0])
        module = Review(
            mid_features=mid_channels or min(512, width),
            features=(*widths, *teacher.tap(vectors[1])),
            sizes=(*sizes, (1, 1)),
        )
        return [*pairs, vectors], module

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        pairs, module = plan(specs)
        shapes = [_as_map(specs.student.tap(source)) for source, _ in pairs]
        return init_module(module, key, *shapes)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        pairs, module = plan(networks(inputs))
        student, teacher = inputs.student.taps, inputs.teacher.taps
        maps = [_vector_as_map(student[source]) for source, _ in pairs]
        fused, memory = apply_module(module, params, memory, *maps, train=True)
        values = [
            losses.hierarchical_context(x, _vector_as_map(teacher[goal]))
            for x, (_, goal) in zip(fused, pairs, strict=True)
        ]
        value = jnp.sum(jnp.stack(values), axis=0)
        value = inputs.progress.warmup(warmup_epochs) * value
        return {"reviewkd": value}, memory

    return Method(init=init, terms=terms, weights={"reviewkd": factor}, num_teachers=1)


def _before_relu(teacher: NetworkSpec, stage: str) -> str:
    tap = f"{stage}_pre"
    return tap if tap in teacher.taps else stage


def _as_map(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 3 else (1, 1, *shape)


def _vector_as_map(x: jax.Array) -> jax.Array:
    return x if x.ndim == 4 else x[:, None, None, :]
