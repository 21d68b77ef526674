"""Methods on the correlation of predictions: DIST."""

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
    multiply,
    no_state,
)
from jaxkd.distill.registry import register
from jaxkd.losses.checks import check_positive


@register()
def dist(
    *,
    beta: Scheduled = 1.0,
    gamma: Scheduled = 1.0,
    temperature: Scheduled = 1.0,
    factor: Scheduled = 2.0,
) -> Method:
    """Correlations within examples and within classes (Huang et al., 2022).

    A strong teacher's probabilities are hard to match exactly; the student only keeps
    how the classes of an example, and the examples of a class, relate.

        factor * T^2 * (beta * (1 - r over classes) + gamma * (1 - r over examples))

    with Pearson's coefficient r of the softened probabilities.

    Needs: logits of one shape, and at least two examples in a batch. In segmentation
    every pixel of the batch is an example; leave the temperature at 1 there, as the
    authors' segmentation code does.

    Cost: nothing beside the teacher's forward pass. Over several devices the sums over
    examples are exchanged.

    Pitfalls: the term `intra` is one number per batch, which small batches make noisy.

    Paper and code: the authors' code correlates the examples of one device, here it is
    the global batch. Their temperatures are 4 on CIFAR-100 and 1 on ImageNet.

    Published: CIFAR-100 top-1 (authors' table): resnet56 -> resnet20 71.75, resnet32x4
    -> resnet8x4 76.31, WRN-40-2 -> WRN-40-1 74.43. ImageNet: ResNet34 -> ResNet18
    72.07, ResNet50 -> MobileNet 73.24. Cityscapes mIoU: DeepLabV3-ResNet18 74.21 ->
    77.10, PSPNet-ResNet18 72.55 -> 76.31.

    Args:
      beta: factor of the term `inter`, over classes.
      gamma: factor of the term `intra`, over examples.
      temperature: softens both distributions; a number or a schedule.
      factor: of both terms.

    Raises:
      ValueError: `temperature` is not positive.

    Reference:
      Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022.
    """
    check_positive("temperature", temperature)

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_same_logits(specs.student, specs.teacher)
        if len(specs.student.logits) == 1 and specs.data.batch_size < 2:
            raise ValueError(
                "method 'dist' correlates the examples of a batch and needs a "
                f"batch_size of at least 2, got {specs.data.batch_size}"
            )
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        logits = inputs.student.logits, inputs.teacher.logits
        now = inputs.at(temperature)
        return {
            "inter": losses.dist_inter(*logits, temperature=now),
            "intra": losses.dist_intra(*logits, temperature=now),
        }, memory

    return Method(
        init=init,
        terms=terms,
        weights={"inter": multiply(factor, beta), "intra": multiply(factor, gamma)},
        num_teachers=1,
    )
