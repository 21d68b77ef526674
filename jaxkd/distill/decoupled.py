"""Methods that weigh the target class and the other classes apart: DKD and NKD."""

from __future__ import annotations

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
    no_state,
)
from jaxkd.distill.registry import register
from jaxkd.losses.checks import check_positive


@register()
def dkd(
    *,
    alpha: Scheduled = 1.0,
    beta: Scheduled = 8.0,
    temperature: Scheduled = 4.0,
    warmup_epochs: int = 20,
) -> Method:
    """Target and non-target knowledge with weights of their own (Zhao et al., 2022).

    `kd` is the sum of a divergence over "the target or not" and of one over the other
    classes, and weighs the latter by the probability that the teacher leaves them: a
    sure teacher teaches little. Here each part has its own factor.

        alpha * T^2 KL([q_y, 1 - q_y] || [p_y, 1 - p_y]) + beta * T^2 KL(q' || p')
        q' = softmax_{k != y}(teacher / T),    p' = softmax_{k != y}(student / T)

    with q and p the softmaxes over all classes at temperature T.

    Needs: logits of one shape, and labels. Of the soft labels of mixed images the
    largest entry is the target. The published recipe has the cross-entropy at weight 1.

    Cost: nothing beside the teacher's forward pass.

    Pitfalls: `beta` depends on the pair. Published values on CIFAR-100: resnet56 ->
    resnet20 and resnet110 -> resnet32 2, WRN-40-2 -> WRN-16-2 and VGG13 -> VGG8 6,
    resnet32x4 -> resnet8x4 and most others 8; on ImageNet 0.5 (ResNet34 -> ResNet18)
    and 2 (ResNet50 -> MobileNet), both with temperature 1 and one epoch of warm-up.

    Paper and code: the linear warm-up is that of the authors' code; both parts are
    multiplied by `min((epoch + 1) / warmup_epochs, 1)`.

    Published: CIFAR-100 top-1 (mdistiller's table): resnet56 -> resnet20 71.97 (KD
    70.66), resnet32x4 -> resnet8x4 76.32 (73.33), WRN-40-2 -> WRN-16-2 76.23 (74.92).
    ImageNet: ResNet34 -> ResNet18 71.70, ResNet50 -> MobileNet 72.05.

    Args:
      alpha: factor of the term `tckd`, the target's.
      beta: factor of the term `nckd`, that of the other classes.
      temperature: softens all distributions; a number or a schedule.
      warmup_epochs: epochs over which both terms grow to their full size; 0 for none.

    Raises:
      ValueError: `temperature` is not positive, or `warmup_epochs` negative.

    Reference:
      Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022.
    """
    check_positive("temperature", temperature)
    if warmup_epochs < 0:
        raise ValueError(f"warmup_epochs must be >= 0, got {warmup_epochs}")

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        arrays = inputs.student.logits, inputs.teacher.logits, inputs.targets
        now = inputs.at(temperature)
        values = {
            "tckd": losses.dkd_target(*arrays, temperature=now),
            "nckd": losses.dkd_nontarget(*arrays, temperature=now),
        }
        growth = inputs.progress.warmup(warmup_epochs)
        return {name: growth * value for name, value in values.items()}, memory

    return Method(
        init=_check,
        terms=terms,
        weights={"tckd": alpha, "nckd": beta},
        num_teachers=1,
    )


@register()
def nkd(*, gamma: Scheduled = 1.5, temperature: Scheduled = 1.0) -> Method:
    """Normalised non-target knowledge beside a soft target (Yang et al., 2023).

    The cross-entropy form of `kd`, split at the target class. The other classes of
    teacher and student are each normalised to one, so that they can match at all.

        -q_y log p_y - gamma * T^2 sum_{k != y} q'_k log p'_k
        q' = softmax_{k != y}(teacher / T),    p' = softmax_{k != y}(student / T)

    with q and p the softmaxes at temperature 1.

    Needs: logits of one shape, and labels. Of the soft labels of mixed images the
    largest entry is the target. The published recipe has the cross-entropy at weight 1.

    Cost: nothing beside the teacher's forward pass.

    Pitfalls: the value does not approach zero, since the teacher's entropy is not
    subtracted.

    Paper and code: the paper divides the probabilities by their sum, the code takes the
    target out of the softmax, and so do we; for the softmax both are the same.
    Published settings (temperature, gamma): ImageNet 1 and 1.5, CIFAR-100 3 and 3.5,
    DeiT students 1 and 1.

    Published: ImageNet top-1 (authors' table): ResNet34 -> ResNet18 71.96 (student
    alone 69.90), ResNet50 -> MobileNet 72.58 (69.21), DeiT III-Small -> DeiT-Tiny 76.68
    (74.42).

    Args:
      gamma: factor of the term `nontarget`.
      temperature: softens the non-target distributions; a number or a schedule.

    Raises:
      ValueError: `temperature` is not positive.

    Reference:
      Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A
      Unified Approach with Normalized Loss and Customized Soft Labels", ICCV 2023.
    """
    check_positive("temperature", temperature)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        arrays = inputs.student.logits, inputs.teacher.logits, inputs.targets
        return {
            "target": losses.nkd_target(*arrays),
            "nontarget": losses.nkd_nontarget(
                *arrays, temperature=inputs.at(temperature)
            ),
        }, memory

    return Method(
        init=_check,
        terms=terms,
        weights={"target": 1.0, "nontarget": gamma},
        num_teachers=1,
    )


def _check(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
    check_same_logits(specs.student, specs.teacher)
    return no_state(key, specs)
