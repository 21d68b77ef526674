"""Multi-granularity distillation for semi-supervised segmentation (MGD-SSSS)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxkd import losses
from jaxkd.distill.box_masks import box_masks
from jaxkd.distill.checks import check_same_logits, check_segmentation, feature_map
from jaxkd.distill.method import (
    Batch,
    Inputs,
    Memory,
    Method,
    Params,
    Specs,
    Terms,
    Weight,
    no_state,
)
from jaxkd.distill.registry import register
from jaxkd.layers import Outputs

_UNLABELLED = ("unlabelled_a", "unlabelled_b")
_VIEWS = (*_UNLABELLED, "mixed")


@register()
def mgd_ssss(
    *,
    lambda_1: Weight = 0.002,
    lambda_2: Weight = 100.0,
    sem_reduction: Literal["sum", "mean"] = "sum",
    teacher_bn: Literal["train", "eval"] = "train",
    teacher_terms: bool = False,
    boxes: int = 3,
    ignore_index: int = 255,
    student_tap: str = "d2",
    wide_tap: str = "d2",
) -> Method:
    """A wide and a deep teacher on labelled and unlabelled images (Qin et al., 2022).

    With student 1, wide teacher 2, deep teacher 3; `S` the logits of labelled images;
    `U` those of two unlabelled batches a, b mixed by boxes; `P_i` the classes that
    network i predicts on a and on b, mixed likewise; `f` a feature map of the mixed
    images, averaged over 7x7 regions:

        supervised:  CE(S_1, labels)
        unlabelled:  CE(U_1, P_2) + CE(U_1, P_3)
        labelled:    CE(S_1, argmax S_2) + CE(S_1, argmax S_3)
        semantic:    lambda_1 * sum_bk |mean_hw U_1 - mean_hw U_3|
        content:     lambda_2 * mean_mn (cos(f_1m, f_1n) - cos(f_2m, f_2n))^2

    The cross-entropy with the labels is a part of this method.

    Needs: two teachers, the wide one first, with logits of the student's shape, and a
    feature map of the student and of the wide teacher, of any sizes and channels. The
    batch must have `unlabelled_image` `[2 n, h, w, c]`: n images to be mixed with n
    others; n need not be the number of labelled images.

    Cost: every network runs on the labelled images, on a, on b and on the mixed images.

    Pitfalls: the published sum over the batch ties `lambda_1` to the number of
    unlabelled images, here of all devices together; the published value is meant for 2
    per device. Use `sem_reduction="mean"` with `lambda_1` times n and classes to be
    free of it. There is no confidence threshold on predicted classes.

    Paper and code: in the code the teachers' batch norms use the statistics of the
    batch (`teacher_bn="train"`); unlike there, the teachers' running statistics stay as
    they are. The code's loss also has the teachers' own cross-entropies, whose
    gradients train nothing; `teacher_terms=True` reports them.

    Args:
      lambda_1: weight of `semantic`; a number or a schedule.
      lambda_2: weight of `content`; a number or a schedule.
      sem_reduction: `"sum"` over batch and classes as published, or `"mean"`.
      teacher_bn: statistics of the teachers' batch norms.
      teacher_terms: whether to add the code's terms without gradient to the loss:
        `wide_supervised` CE(S_2, labels), `deep_supervised` CE(S_3, labels),
        `teachers_unlabelled` CE(U_2, P_1) + CE(U_3, P_1), and `teachers_labelled`
        CE(S_2, argmax S_1) + CE(S_3, argmax S_1).
      boxes: boxes per mask, see `box_masks`.
      ignore_index: label of pixels that do not count.
      student_tap: a feature map of the student.
      wide_tap: a feature map of the wide teacher.

    Raises:
      ValueError: `boxes` is below 1.

    Reference:
      Qin et al., "Multi-Granularity Distillation Scheme Towards Lightweight
      Semi-Supervised Semantic Segmentation", ECCV 2022.
    """
    if boxes < 1:
        raise ValueError(f"boxes must be >= 1, got {boxes}")

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_segmentation("mgd_ssss", specs.student)
        if len(specs.teachers) != 2:
            raise ValueError(
                f"method 'mgd_ssss' needs two teachers, the wide and the deep one; the "
                f"stage has {len(specs.teachers)}"
            )
        for teacher in specs.teachers:
            check_same_logits(specs.student, teacher)
        feature_map(specs.student, student_tap)
        feature_map(specs.teachers[0], wide_tap)
        return no_state(key, specs)

    def prepare(batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        if "unlabelled_image" not in batch:
            raise ValueError(
                "method 'mgd_ssss' needs batch['unlabelled_image']; give the stage "
                "unlabelled data"
            )
        images = batch["unlabelled_image"]
        if images.shape[0] % 2:
            raise ValueError(
                f"method 'mgd_ssss' mixes unlabelled images in pairs; the batch has "
                f"{images.shape[0]}"
            )
        first, second = jnp.split(images, 2)
        mask = box_masks(key, first.shape[0], first.shape[1:3], boxes=boxes)
        return {
            **batch,
            "image_unlabelled_a": first,
            "image_unlabelled_b": second,
            "image_mixed": jnp.where(mask > 0, second, first),
            "mixed_mask": mask,
        }

    def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return losses.labelled_cross_entropy(logits, labels, ignore_index=ignore_index)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        student = inputs.student
        teachers = jax.lax.stop_gradient(inputs.teachers)
        mask = inputs.batch["mixed_mask"]
        mixed = student.views["mixed"]
        mixed_wide, mixed_deep = (t.views["mixed"] for t in teachers)
        values = {
            "supervised": cross_entropy(student.logits, inputs.labels),
            "unlabelled": sum(
                cross_entropy(mixed.logits, _mixed_classes(t, mask)) for t in teachers
            ),
            "labelled": sum(
                cross_entropy(student.logits, _classes(t.logits)) for t in teachers
            ),
            "semantic": losses.semantic_consistency(
                mixed.logits, mixed_deep.logits, reduction=sem_reduction
            ),
            "content": losses.content_consistency(
                mixed.taps[student_tap], mixed_wide.taps[wide_tap]
            ),
        }
        if teacher_terms:
            pseudo = _mixed_classes(student, mask)
            classes = _classes(student.logits)
            names = ("wide_supervised", "deep_supervised")
            for name, teacher in zip(names, teachers, strict=True):
                values[name] = cross_entropy(teacher.logits, inputs.labels)
            values["teachers_unlabelled"] = sum(
                cross_entropy(t.views["mixed"].logits, pseudo) for t in teachers
            )
            values["teachers_labelled"] = sum(
                cross_entropy(t.logits, classes) for t in teachers
            )
        return values, memory

    weights: dict[str, Weight] = {
        "supervised": 1.0,
        "unlabelled": 1.0,
        "labelled": 1.0,
        "semantic": lambda_1,
        "content": lambda_2,
    }
    if teacher_terms:
        weights |= dict.fromkeys(
            (
                "wide_supervised",
                "deep_supervised",
                "teachers_unlabelled",
                "teachers_labelled",
            ),
            1.0,
        )
    return Method(
        init=init,
        terms=terms,
        weights=weights,
        num_teachers=2,
        views=_VIEWS,
        needs=("unlabelled_image",),
        prepare=prepare,
        teacher_mode=teacher_bn,
    )


def _classes(logits: jax.Array) -> jax.Array:
    return jnp.argmax(jax.lax.stop_gradient(logits), axis=-1).astype(jnp.int32)


def _mixed_classes(network: Outputs, mask: jax.Array) -> jax.Array:
    """What the network predicts on both unlabelled batches, mixed as the images are."""
    first, second = (network.views[view].logits for view in _UNLABELLED)
    if mask.shape[:3] != first.shape[:3]:
        raise ValueError(
            f"logits {first.shape[1:3]} must have the size of the images "
            f"{mask.shape[1:3]}"
        )
    return jnp.where(mask[..., 0] > 0, _classes(second), _classes(first))
