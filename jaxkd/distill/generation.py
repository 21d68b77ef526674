"""Methods in which a masked feature of the student must generate the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxkd import losses
from jaxkd.distill.adapters import Adapter, adapter
from jaxkd.distill.checks import feature_map
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Scheduled,
    Specs,
    Terms,
    multiply,
)
from jaxkd.distill.modules import apply_module, init_module
from jaxkd.distill.registry import register
from jaxkd.distill.taps import Networks, last_stage, networks, stage_pairs
from jaxkd.layers import NetworkSpec
from jaxkd.layers.connectors import MaskedGenerator, token_grid, tokens_to_map

MaskUnit = Literal["channels", "pixels"]


@register()
def mgd_masked(
    *,
    student_tap: str | None = None,
    teacher_tap: str | None = None,
    mask_unit: MaskUnit = "channels",
    alpha: Scheduled = 7e-5,
    lambda_mgd: float = 0.15,
) -> Method:
    """A masked map of the student generates the teacher's map (Yang et al., 2022).

    A random share of the student's channels (or pixels) is set to zero; two
    convolutions `G`, trained with the student, must rebuild the teacher's full map.

        alpha * sum (G(mask * align(student)) - teacher)^2

    The usual recipe is `weighted({"ce": 1.0, "mgd_masked": 1.0})`. Recipes of the
    published code: ImageNet classification `alpha=7e-5`, CIFAR-100 `alpha=1.2e-3`, both
    with masked channels and `lambda_mgd=0.15`; segmentation `mask_unit="pixels"`,
    `lambda_mgd=0.75`, `alpha=2e-5`.

    Needs: one map of each network, of one height and width. `align` is a 1x1
    convolution where channels differ.

    Cost: two 3x3 convolutions in the teacher's width.

    Pitfalls: the loss is a sum over the map, not a mean, so `alpha` depends on the
    size and width of the teacher's map.

    Paper and code: as in the code, a classifier's mask removes whole channels and a
    segmentation network's removes pixels. What is kept is not rescaled.

    Published: ImageNet top-1: 71.69 for ResNet-18 from ResNet-34, 72.49 for
    MobileNet-V1 from ResNet-50. Cityscapes mIoU (val): PSPNet-R18 69.85 -> 73.63,
    DeepLabV3-R18 73.20 -> 76.31; authors' repository.

    Args:
      student_tap: map of the student; None takes its last stage.
      teacher_tap: map of the teacher; None takes its last stage.
      mask_unit: what is removed as a whole: "channels" or "pixels".
      alpha: weight of the term.
      lambda_mgd: share that is removed, on average.

    Raises:
      ValueError: `lambda_mgd` is not in `[0, 1)`.

    Reference:
      Yang et al., "Masked Generative Distillation", ECCV 2022.
    """
    if not 0 <= lambda_mgd < 1:
        raise ValueError(f"lambda_mgd must be in [0, 1), got {lambda_mgd}")

    def taps(found: Specs | Networks) -> tuple[str, str]:
        return (
            last_stage(found.student, student_tap, option="student_tap"),
            last_stage(found.teacher, teacher_tap, option="teacher_tap"),
        )

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        source, goal = taps(specs)
        shape = feature_map(specs.student, source)
        target = feature_map(specs.teacher, goal)
        if shape[:2] != target[:2]:
            raise ValueError(
                f"tap {source!r} of network {specs.student.name!r} has shape {shape} "
                f"and tap {goal!r} of network {specs.teacher.name!r} {target}; "
                f"mgd_masked needs maps of one height and width"
            )
        module = MaskedGenerator(target[-1])
        return init_module(module, key, shape, (1, 1, target[-1]))

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        source, goal = taps(networks(inputs))
        student, teacher = inputs.student.taps[source], inputs.teacher.taps[goal]
        generated, memory = apply_module(
            MaskedGenerator(teacher.shape[-1]),
            params,
            memory,
            student,
            random_mask(inputs.key, teacher.shape, lambda_mgd, mask_unit),
            train=True,
        )
        return {"mgd_masked": losses.reconstruction(generated, teacher)}, memory

    return Method(init=init, terms=terms, weights={"mgd_masked": alpha}, num_teachers=1)


@register()
def vitkd(
    *,
    student_taps: tuple[str, ...] = ("block1", "block2"),
    teacher_taps: tuple[str, ...] = ("block1", "block2"),
    student_tap: str = "tokens",
    teacher_tap: str = "tokens",
    alpha: Scheduled = 3e-5,
    beta: Scheduled = 3e-6,
    lambda_vitkd: float = 0.5,
) -> Method:
    """A transformer imitates early blocks and generates the last (Yang et al., 2022).

    Tokens of the first two blocks are imitated directly. Of the last tokens, a random
    share `lambda_vitkd` in each image is replaced by a learned vector, and two 3x3
    convolutions `G` on the grid of tokens must rebuild the teacher's there.

        alpha * sum over early taps of sum (align(student) - teacher)^2
        + beta / lambda_vitkd * sum over masked tokens of (G(student) - teacher)^2

    The usual recipe adds NKD: `weighted({"ce": 1.0, "nkd": 1.0, "vitkd": 1.0})`.

    Needs: transformers with the same square grid of tokens; up to two class tokens
    before it are dropped. `align` is a dense layer where widths differ; so is the first
    layer of the generation.

    Cost: two 3x3 convolutions in the teacher's width, and up to three dense layers.

    Pitfalls: the losses are sums over tokens, so `alpha` and `beta` are small and
    depend on the number of tokens and the teacher's width.

    Published: ImageNet top-1, DeiT-Tiny from DeiT III-Small: alone 74.42, NKD 76.68,
    NKD and ViTKD together 77.78; authors' repository.

    Args:
      student_taps: early tokens of the student.
      teacher_taps: early tokens of the teacher, as many.
      student_tap: the student's last tokens, after its final norm.
      teacher_tap: those of the teacher.
      alpha: weight of the imitation, term "mimicking".
      beta: weight of the generation, before it is divided by `lambda_vitkd`.
      lambda_vitkd: share of the tokens that is masked.

    Raises:
      ValueError: `lambda_vitkd` is not between 0 and 1.

    Reference:
      Yang et al., "ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation",
      2022.
    """
    if not 0 < lambda_vitkd <= 1:
        raise ValueError(f"lambda_vitkd must be in (0, 1], got {lambda_vitkd}")

    def early(found: Specs | Networks) -> list[tuple[str, str, Adapter]]:
        student, teacher = found.student, found.teacher
        return [
            (source, goal, adapter(student, source, teacher, goal))
            for source, goal in stage_pairs(found, student_taps, teacher_taps)
        ]

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        student, teacher = specs.student, specs.teacher
        for source, goal in stage_pairs(specs, student_taps, teacher_taps):
            _check_tokens(student, source, teacher, goal)
        _check_tokens(student, student_tap, teacher, teacher_tap)
        params = {}
        for i, (source, _, chosen) in enumerate(early(specs)):
            params[f"early{i}"], _ = init_module(
                chosen.module, jax.random.fold_in(key, i), student.tap(source)
            )
        side, width = _side(student, student_tap), student.tap(student_tap)[1]
        params["late"], _ = init_module(
            MaskedGenerator(teacher.tap(teacher_tap)[1], learned_fill=True),
            jax.random.fold_in(key, len(params)),
            (side, side, width),
            (side, side, 1),
        )
        return params, {}

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        students, teachers = inputs.student.taps, inputs.teacher.taps
        imitated = []
        for i, (source, goal, chosen) in enumerate(early(networks(inputs))):
            matched, _ = apply_module(
                chosen.module, params[f"early{i}"], {}, students[source], train=True
            )
            target = chosen.target(teachers[goal])
            imitated.append(losses.reconstruction(matched, target))
        source = tokens_to_map(students[student_tap])
        goal = tokens_to_map(teachers[teacher_tap])
        keep = token_mask(inputs.key, goal.shape, lambda_vitkd)
        generated, _ = apply_module(
            MaskedGenerator(goal.shape[-1], learned_fill=True),
            params["late"],
            {},
            source,
            keep,
            train=True,
        )
        values = {
            "mimicking": jnp.sum(jnp.stack(imitated), axis=0),
            "generation": losses.reconstruction(generated, goal, positions=1 - keep),
        }
        return values, memory

    weights = {"mimicking": alpha, "generation": multiply(beta, 1 / lambda_vitkd)}
    return Method(init=init, terms=terms, weights=weights, num_teachers=1)


def random_mask(
    key: jax.Array, shape: Sequence[int], share: float, unit: MaskUnit
) -> Float32[Array, "b mask_h mask_w mask_c"]:
    """Draws what MGD keeps (1) and removes (0), each unit independently.

    Args:
      key: random key.
      shape: `(batch, height, width, channels)` of the map to be masked.
      share: probability that a unit is removed.
      unit: "channels" gives a mask `[b, 1, 1, c]`, "pixels" one `[b, h, w, 1]`.
    """
    batch, height, width, channels = shape
    ones = (1, 1, channels) if unit == "channels" else (height, width, 1)
    kept = jax.random.uniform(key, (batch, *ones)) >= share
    return kept.astype(jnp.float32)


def token_mask(
    key: jax.Array, shape: Sequence[int], share: float
) -> Float32[Array, "b h w one"]:
    """Draws what ViTKD keeps: `int((1 - share) * tokens)` of each image's tokens.

    Args:
      key: random key.
      shape: `(batch, height, width, channels)` of the tokens on their grid.
      share: how many of the tokens are removed.

    Returns:
      1 for kept tokens and 0 for the others, `[b, h, w, 1]`.
    """
    batch, height, width, _ = shape
    tokens = height * width
    noise = jax.random.uniform(key, (batch, tokens))
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    kept = (rank < int(tokens * (1 - share))).astype(jnp.float32)
    return kept.reshape(batch, height, width, 1)


def _side(network: NetworkSpec, tap: str) -> int:
    """The side of the grid of a tap that must be tokens."""
    shape = network.tap(tap)
    grid = token_grid(shape[0]) if len(shape) == 2 else None
    if grid is None:
        raise ValueError(
            f"tap {tap!r} of network {network.name!r} has shape {shape}; this method "
            f"needs tokens on a square grid, [tokens, channels], after 0 to 2 class "
            f"tokens"
        )
    return grid[1]


def _check_tokens(
    student: NetworkSpec, student_tap: str, teacher: NetworkSpec, teacher_tap: str
) -> None:
    sides = _side(student, student_tap), _side(teacher, teacher_tap)
    if sides[0] != sides[1]:
        raise ValueError(
            f"tap {student_tap!r} of network {student.name!r} has "
            f"{sides[0]}x{sides[0]} tokens and tap {teacher_tap!r} of network "
            f"{teacher.name!r} {sides[1]}x{sides[1]}; vitkd needs one grid"
        )
