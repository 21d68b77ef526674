"""FKD: soft labels that a teacher gave once to stored crops of every image."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxkd import losses
from jaxkd.distill.checks import check_same_logits
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
from jaxkd.distill.self_distillation import check_classifier
from jaxkd.losses.checks import check_positive
from jaxkd.numerics import compress_labels, kept_classes, recover_labels


@register()
def fkd(
    *,
    labels: Literal["stored", "teacher"] = "stored",
    label_format: str = "marginal_smoothing_k5",
    temperature: Scheduled = 1.0,
) -> Method:
    """Soft labels that a teacher gave to stored crops beforehand (Shen and Xing, 2022).

        -sum_k q_k log softmax(student / T)_k

    q is what the teacher said of the very crop that the student sees, stored as its
    few largest entries and made dense again. There is no factor T^2 and no hard
    label: use the method without `ce`.

    Needs: with `labels="stored"`, `batch["target"]`, as `jaxkd.data.choose_regions`
    makes it from the labels that `jaxkd.data.store_regions` wrote; no teacher. With
    `labels="teacher"`, one live teacher: its output is compressed and recovered, so
    that the student learns what stored labels would have told it.

    Cost: stored labels cost no forward pass of a teacher; that was paid once, when
    they were made.

    Pitfalls: crop and flip are part of the label: nothing that moves the image may
    follow them. With several crops of an image in a batch, count epochs accordingly.
    Other parts of a method (`ce`, too) read stored labels as the labels of mixed
    images, in the place of the class.

    Published: ImageNet top-1 of the authors' repository: ResNet-50 80.1 (SGD), 79.8
    (plain recipe) and 80.5 (AdamW), ResNet-101 81.9, DeiT-T 75.2. Recipe of the
    convolutional networks: batch 1024, cosine schedule, 4 or 8 crops per image.

    Args:
      labels: where the soft labels come from.
      label_format: how they are compressed, see `jaxkd.numerics.compressed_labels`;
        read with `labels="teacher"` (stored labels know their own format).
      temperature: of the student alone.

    Raises:
      ValueError: no such format or too few classes for it, `temperature` is not
        positive, logits have other shapes, or the batch has no stored labels.

    Reference:
      Shen, Xing, "A Fast Knowledge Distillation Framework for Visual Recognition",
      ECCV 2022.
    """
    check_positive("temperature", temperature)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_classifier("fkd", specs.student)
        if labels == "teacher":
            kept_classes(label_format, specs.student.num_classes)
            check_same_logits(specs.student, specs.teacher)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        student = inputs.student.logits
        if labels == "stored":
            target = stored_target("fkd", inputs)
        else:
            logits = inputs.teacher.logits.astype(jnp.float32)
            stored = compress_labels(
                jax.nn.softmax(logits, axis=-1), label_format=label_format
            )
            target = recover_labels(
                *stored, label_format=label_format, num_classes=student.shape[-1]
            )
        value = losses.soft_cross_entropy(
            student, target, temperature=inputs.at(temperature)
        )
        return {"fkd": value}, memory

    return Method(
        init=init,
        terms=terms,
        weights={"fkd": 1.0},
        num_teachers=1 if labels == "teacher" else 0,
        needs=("target",) if labels == "stored" else (),
    )


def stored_target(method: str, inputs: Inputs) -> jax.Array:
    """The stored soft labels of a batch, float32 `[batch, classes]`.

    Raises:
      ValueError: the batch has none.
    """
    if "target" not in inputs.batch:
        raise ValueError(
            f"method {method!r} reads stored soft labels, but the batch has no "
            f"'target'; train on data with stored regions, or on a live teacher"
        )
    return inputs.batch["target"]
