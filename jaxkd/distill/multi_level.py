"""Multi-level logit distillation of a weakly and a strongly augmented view."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
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
from jaxkd.losses.checks import check_positive

VIEW = "strong"

# The published code applies the last two temperatures of its strong block to the weak
# view.
_MISPLACED = 2


@register()
def mlld(
    *,
    variant: Literal["code", "paper"] = "code",
    temperatures: tuple[float, ...] = (4.0, 3.0, 5.0, 2.0, 6.0),
    ce_weight: Scheduled = 0.1,
    kd_weight: Scheduled = 0.9,
    standardize: bool = False,
) -> Method:
    """Examples, classes and batches matched at several temperatures (Jin et al., 2023).

    Instance level `kd`, the correlation of classes `sum |P^T P - Q^T Q|^2 / K` and
    that of examples `sum |P P^T - Q Q^T|^2 / B`, each summed over five temperatures,
    on a weakly and a strongly augmented view. On the weak view only the examples
    (classes) count whose confidence under the teacher is at most the median.

        ce_weight * (CE_weak + CE_strong) + kd_weight * (kd + cc + bc)

    Needs: class logits of one shape, labels, at least two examples in a batch, and the
    strong view of every image as the batch's entry `image_strong` (the published one is
    RandAugment with two operations of strength 10). The cross-entropy is part of the
    method, so that both views get it: compose it with no `ce`.

    Cost: a second forward pass of student and teacher, with the student's gradient, for
    the strong view.

    Pitfalls: about twice the time of a step of `kd`. Mixing of images must act on
    both views alike. The published learning rate is half the usual one (0.025).

    Paper and code: the default computes what the published code does. There the masks
    meet losses that are already reduced, and so only scale them by the fraction of
    what is kept; the temperatures 2 and 6 of the strong view's `kd` see the weak view;
    the strong view's correlations are discarded. `variant="paper"` masks single
    examples and classes, and uses all terms on their own view.

    Published: CIFAR-100 top-1 (as in the logit standardisation authors' table):
    resnet56 -> resnet20 72.19 (KD 70.66), resnet32x4 -> resnet8x4 77.08 (73.33),
    WRN-40-2 -> WRN-16-2 76.63 (74.92); with standardised logits 72.33, 78.28, 76.95.

    Args:
      variant: see above.
      temperatures: softening both distributions; in the variant "code" the last two
        are those that see the weak view.
      ce_weight: factor of the term `ce`, the sum over both views.
      kd_weight: factor of the terms `kd`, `cc` (classes) and `bc` (examples).
      standardize: whether the instance level sees standardised logits, as in
        `logit_standardization`; the correlations never do.

    Raises:
      ValueError: no temperatures, or one that is not positive.

    Reference:
      Jin, Wang, Lin, "Multi-level Logit Distillation", CVPR 2023.
    """
    if not temperatures:
        raise ValueError("temperatures must hold at least one number")
    for temperature in temperatures:
        check_positive("temperatures", temperature)
    levels = {"code": _published_levels, "paper": _masked_levels}[variant]

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_same_logits(specs.student, specs.teacher)
        if len(specs.student.logits) != 1:
            raise ValueError(
                f"method 'mlld' needs logits [classes]; network "
                f"{specs.student.name!r} has {specs.student.logits}"
            )
        if specs.data.batch_size < 2:
            raise ValueError(
                "method 'mlld' correlates the examples of a batch and needs a "
                f"batch_size of at least 2, got {specs.data.batch_size}"
            )
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        weak = inputs.student.logits, inputs.teacher.logits
        strong = (
            inputs.student.views[VIEW].logits,
            inputs.teacher.views[VIEW].logits,
        )
        ce = _sum(
            losses.cross_entropy(student, inputs.targets)
            for student in (weak[0], strong[0])
        )
        values = levels(weak, strong, temperatures)
        if standardize:
            scored = _standardized(weak), _standardized(strong)
            values["kd"] = levels(scored[0], scored[1], temperatures, masks=weak)["kd"]
        return {"ce": ce, **values}, memory

    return Method(
        init=init,
        terms=terms,
        weights={"ce": ce_weight, "kd": kd_weight, "cc": kd_weight, "bc": kd_weight},
        num_teachers=1,
        views=(VIEW,),
    )


Pair = tuple[jax.Array, jax.Array]


def _standardized(pair: Pair) -> Pair:
    return losses.standardize_logits(pair[0]), losses.standardize_logits(pair[1])


def _published_levels(
    weak: Pair,
    strong: Pair,
    temperatures: tuple[float, ...],
    *,
    masks: Pair | None = None,
) -> Terms:
    sure = (weak if masks is None else masks)[1]
    examples = jnp.mean(losses.low_confidence(sure).astype(jnp.float32))
    classes = jnp.mean(losses.low_confidence_classes(sure).astype(jnp.float32))
    own, misplaced = temperatures[:-_MISPLACED], temperatures[-_MISPLACED:]
    kd = [examples * _over(losses.kd, weak, temperatures)]
    if own:
        kd.append(_over(losses.kd, strong, own))
    kd.append(_over(losses.kd, weak, misplaced))
    return {
        "kd": _sum(kd),
        "cc": classes * _over(losses.class_correlation, weak, temperatures),
        "bc": examples * _over(losses.batch_correlation, weak, temperatures),
    }


def _masked_levels(
    weak: Pair,
    strong: Pair,
    temperatures: tuple[float, ...],
    *,
    masks: Pair | None = None,
) -> Terms:
    sure = (weak if masks is None else masks)[1]
    examples = losses.low_confidence(sure)
    classes = losses.low_confidence_classes(sure)
    return {
        "kd": _over(losses.kd, weak, temperatures, where=examples)
        + _over(losses.kd, strong, temperatures),
        "cc": _over(losses.class_correlation, weak, temperatures, where=classes)
        + _over(losses.class_correlation, strong, temperatures),
        "bc": _over(losses.batch_correlation, weak, temperatures, where=examples)
        + _over(losses.batch_correlation, strong, temperatures),
    }


def _over(
    loss: Callable[..., jax.Array],
    pair: Pair,
    temperatures: tuple[float, ...],
    where: jax.Array | None = None,
) -> jax.Array:
    """The sum of a loss over temperatures."""
    options = {} if where is None else {"where": where}
    return _sum(loss(*pair, temperature=t, **options) for t in temperatures)


def _sum(values: Iterable[jax.Array]) -> jax.Array:
    """The sum of one or more arrays."""
    return functools.reduce(operator.add, values)
