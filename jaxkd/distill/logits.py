"""Methods that compare softened class distributions with those of one teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

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
    Weight,
    no_state,
)
from jaxkd.distill.registry import register
from jaxkd.losses.blocks import rowwise
from jaxkd.losses.checks import Scalar, check_positive


@register()
def kd(*, temperature: Scheduled = 4.0) -> Method:
    """The student matches the teacher's softened classes (Hinton et al., 2015).

    Wrong classes that the teacher finds likely tell more than the label does; a high
    temperature brings them out.

        T^2 * KL(softmax(teacher / T) || softmax(student / T))

    Needs: logits of one shape, of classes or, pixel by pixel, of segmentations. The
    usual recipe is `weighted({"ce": 0.1, "kd": 0.9})`.

    Cost: nothing beside the teacher's forward pass.

    Pitfalls: the sum runs over classes. Code bases that average over them (Tf-KD, DeiT,
    several segmentation repositories) need weights that are larger by the number of
    classes.

    Published: CIFAR-100 top-1 (RepDistiller's table, 240 epochs): resnet56 -> resnet20
    70.66 (student alone 69.06), resnet32x4 -> resnet8x4 73.33 (72.50), WRN-40-2 ->
    WRN-16-2 74.92 (73.26). ImageNet (mdistiller's table): ResNet34 -> ResNet18 71.03.

    Args:
      temperature: softens both distributions; a number or a schedule.

    Raises:
      ValueError: `temperature` is not positive.

    Reference:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    check_positive("temperature", temperature)

    def loss(inputs: Inputs) -> jax.Array:
        return losses.kd(
            inputs.student.logits,
            inputs.teacher.logits,
            temperature=inputs.at(temperature),
        )

    return _one_term("kd", loss)


@register()
def kd_cross_entropy(*, temperature: Scheduled = 4.0) -> Method:
    """`kd` as a cross-entropy, without the teacher's entropy (Hinton et al., 2015).

    The same gradient as `kd`, for recipes whose published loss values have this form.

        -T^2 * sum_k softmax(teacher / T)_k log softmax(student / T)_k

    Needs: logits of one shape, of classes or, pixel by pixel, of segmentations.

    Cost: nothing beside the teacher's forward pass.

    Pitfalls: its value does not approach zero; the teacher's entropy is a floor.

    Args:
      temperature: softens both distributions; a number or a schedule.

    Raises:
      ValueError: `temperature` is not positive.

    Reference:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    check_positive("temperature", temperature)

    def loss(inputs: Inputs) -> jax.Array:
        return losses.kd_cross_entropy(
            inputs.student.logits,
            inputs.teacher.logits,
            temperature=inputs.at(temperature),
        )

    return _one_term("kd_cross_entropy", loss)


@register()
def wsld(*, temperature: Scheduled = 2.0, alpha: Scheduled = 2.5) -> Method:
    """Soft labels count by how far the student is behind (Zhou et al., 2021).

    Soft labels lower the variance and raise the bias; on examples that the student
    knows better than the teacher only the bias is left. Each example is weighted by

        alpha * (1 - exp(-CE(student) / CE(teacher)))

    with constant cross-entropies against its label, times the cross-entropy of the
    softened distributions and T^2.

    Needs: logits of one shape, and labels. The labels of mixed images may be soft.

    Cost: nothing beside the teacher's forward pass.

    Pitfalls: a teacher that is certain of a label gives a weight of almost 1 whatever
    the student knows. Published recipes add the plain cross-entropy with weight 1.

    Paper and code: the form is that of the re-implementation in the repository of NKD.

    Args:
      temperature: softens both distributions: 2 on ImageNet, 4 on CIFAR.
      alpha: factor of the loss: 2.5 on ImageNet, 2.25 on CIFAR.

    Raises:
      ValueError: `temperature` is not positive.

    Reference:
      Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
      Tradeoff Perspective", ICLR 2021.
    """
    check_positive("temperature", temperature)

    def loss(inputs: Inputs) -> jax.Array:
        return losses.wsld(
            inputs.student.logits,
            inputs.teacher.logits,
            inputs.targets,
            temperature=inputs.at(temperature),
        )

    return _one_term("wsld", loss, alpha)


@register()
def logit_standardization(
    *,
    base: Literal["kd", "dkd"] = "kd",
    temperature: Scheduled = 2.0,
    factor: Scheduled = 9.0,
    alpha: Scheduled = 1.0,
    beta: Scheduled = 8.0,
    eps: float = 1e-7,
    warmup_epochs: int = 20,
) -> Method:
    """`kd` or `dkd` on z-scored logits (Sun et al., 2024).

    A small student cannot reach the range of a large teacher's logits and need not:
    both are standardised over the classes first, so that only their relations count.

        factor * kd((z - mean z) / (std z + eps))

    Needs: logits of one shape, and labels for `dkd`. The published recipe for `kd` is
    `weighted({"ce": 0.1, "logit_standardization": 1.0})`.

    Cost: nothing beside the teacher's forward pass.

    Pitfalls: the temperature no longer softens logits of a known range but z-scores of
    at most sqrt(K); values fitted for `kd` do not carry over. Student logits that are
    all equal, as from a head that starts at zero, get no gradient from this loss.

    Paper and code: the deviation is the unbiased one and `eps` is added to it, as in
    the authors' code, which also multiplies by T^2. Their temperatures are 2 to 4 and
    their factors 9 to 18, by pair of networks.

    Published: CIFAR-100 top-1 (authors' table) with `kd`: resnet56 -> resnet20 71.43
    (KD 70.66), resnet32x4 -> resnet8x4 76.62 (73.33), WRN-40-2 -> WRN-16-2 76.11
    (74.92); with `dkd`: 72.32, 77.01, 76.39.

    Args:
      base: the loss that sees the standardised logits.
      temperature: of that loss.
      factor: of that loss.
      alpha: factor of the target part of `dkd`.
      beta: factor of the non-target part of `dkd`.
      eps: added to the standard deviation.
      warmup_epochs: epochs over which `dkd` grows to its full size; 0 for none. `kd`
        has no warm-up.

    Raises:
      ValueError: `temperature` or `eps` is not positive, or `warmup_epochs` negative.

    Reference:
      Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024.
    """
    check_positive("temperature", temperature)
    check_positive("eps", eps)
    if warmup_epochs < 0:
        raise ValueError(f"warmup_epochs must be >= 0, got {warmup_epochs}")

    @rowwise
    def of_kd(student: jax.Array, teacher: jax.Array, temperature: Scalar) -> jax.Array:
        student = losses.standardize_logits(student, eps=eps)
        teacher = losses.standardize_logits(teacher, eps=eps)
        return losses.kd(student, teacher, temperature=temperature)

    @rowwise
    def of_dkd(
        student: jax.Array, teacher: jax.Array, labels: jax.Array, **factors: Any
    ) -> jax.Array:
        student = losses.standardize_logits(student, eps=eps)
        teacher = losses.standardize_logits(teacher, eps=eps)
        return losses.dkd(student, teacher, labels, **factors)

    def loss(inputs: Inputs) -> jax.Array:
        student, teacher = inputs.student.logits, inputs.teacher.logits
        now = inputs.at(temperature)
        if base == "kd":
            return of_kd(student, teacher, now)
        value = of_dkd(
            student,
            teacher,
            inputs.targets,
            alpha=inputs.at(alpha),
            beta=inputs.at(beta),
            temperature=now,
        )
        return inputs.progress.warmup(warmup_epochs) * value

    return _one_term("logit_standardization", loss, factor)


def _one_term(
    name: str, loss: Callable[[Inputs], jax.Array], factor: Weight = 1.0
) -> Method:
    """A method without state whose only term is `loss`."""

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_same_logits(specs.student, specs.teacher)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        return {name: loss(inputs)}, memory

    return Method(init=init, terms=terms, weights={name: factor}, num_teachers=1)
