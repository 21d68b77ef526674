"""Methods without a teacher: the task losses.

Each reads the soft labels of mixed images where the batch has them, and the class
indices otherwise.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxkd import losses
from jaxkd.distill.checks import check_segmentation
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Specs,
    Terms,
    compose,
    no_state,
)
from jaxkd.distill.registry import register
from jaxkd.losses.checks import check_fraction, check_positive


@register()
def ce(*, label_smoothing: float = 0.0) -> Method:
    """Cross-entropy with the labels; for classification and, per pixel, segmentation.

    Args:
      label_smoothing: share of the uniform distribution mixed into the labels.

    Raises:
      ValueError: `label_smoothing` is outside [0, 1].
    """
    check_fraction("label_smoothing", label_smoothing)

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return losses.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    return _supervised("ce", loss)


@register()
def focal(*, gamma: float = 2.0) -> Method:
    """Focal loss, see `losses.focal`; for classification and segmentation.

    Args:
      gamma: exponent of the modulating factor.

    Raises:
      ValueError: `gamma` is negative.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}")

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return losses.focal(logits, labels, gamma=gamma)

    return _supervised("focal", loss)


@register()
def dice(
    *, smooth: float = 1.0, over: Literal["example", "batch"] = "example"
) -> Method:
    """Soft Dice loss of a segmentation network, background excluded.

    Args:
      smooth: added to both parts of the ratio.
      over: `"example"` for one ratio per image, `"batch"` for one over the whole
        (global) batch.

    Raises:
      ValueError: `smooth` is not positive.
    """
    check_positive("smooth", smooth)
    function = {"example": losses.dice, "batch": losses.batch_dice}[over]

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return function(logits, labels, smooth=smooth)

    return _supervised("dice", loss, segmentation=True)


@register()
def bce_dice(
    *, smooth: float = 1e-7, denominator: Literal["squared", "plain"] = "squared"
) -> Method:
    """Binary cross-entropy plus batch-wide Dice of every foreground class.

    The network's softmax is read as one question per foreground class, "this class or
    another?", whose probability is the softmax's.

    Args:
      smooth: of the Dice ratio.
      denominator: of the Dice ratio, see `losses.binary_dice`.

    Raises:
      ValueError: `smooth` is not positive.
    """
    check_positive("smooth", smooth)

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        classes = logits.shape[-1]
        if jnp.issubdtype(labels.dtype, jnp.integer):
            labels = jax.nn.one_hot(labels, classes)
        return losses.bce_dice(
            losses.foreground_logits(logits),
            labels[..., 1:],
            smooth=smooth,
            denominator=denominator,
        )

    return _supervised("bce_dice", loss, segmentation=True)


@register()
def focal_dice(*, gamma: float = 2.0, smooth: float = 1.0) -> Method:
    """HLFD's segmentation loss: half focal, half Dice over the batch.

    Args:
      gamma: of the focal loss.
      smooth: of the Dice ratio.

    Raises:
      ValueError: `gamma` is negative or `smooth` not positive.
    """
    return compose(
        {"focal": focal(gamma=gamma), "dice": dice(smooth=smooth, over="batch")},
        {"focal": 0.5, "dice": 0.5},
    )


def _supervised(name: str, loss, *, segmentation: bool = False) -> Method:
    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        if segmentation:
            check_segmentation(name, specs.student)
        return no_state(key, specs)

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        del params
        return {name: loss(inputs.student.logits, inputs.targets)}, memory

    return Method(init=init, terms=terms, weights={name: 1.0})
