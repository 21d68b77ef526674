"""Losses against the labels: classification and segmentation.

Labels are integers, or soft targets with a class axis (mixed images, one-hot masks).
Losses that couple the batch (`batch_dice`, and the Dice part of `bce_dice`) return
the batch's value once per example, so that their mean is the published number.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Integer, Num

from jaxkd.losses.blocks import rowwise
from jaxkd.losses.checks import (
    Scalar,
    check_fraction,
    check_mask,
    check_positive,
    keep,
    mean_per_example,
    sum_per_example,
)
from jaxkd.numerics import log_normalizer, pick

Labels = Integer[Array, "..."] | Float[Array, "..."]


def cross_entropy(
    logits: Float[Array, "*batch k"],
    labels: Labels,
    *,
    label_smoothing: Scalar = 0.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float32[Array, "*batch"]:
    """Softmax cross-entropy against integer or soft labels.

        -sum_k y_k log softmax(z)_k,    y = (1 - smoothing) labels + smoothing / K

    Args:
      logits: `[batch, classes]` or `[batch, height, width, classes]`.
      labels: integers of the shape of the logits without the class axis, or
        probabilities of the shape of the logits.
      label_smoothing: share of the uniform distribution mixed into the labels.
      where: which examples or pixels count; the others get 0.

    Returns:
      One float32 value per example, or per pixel.

    Raises:
      ValueError: labels fit neither shape, or `label_smoothing` is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> print(cross_entropy(jnp.array([[1.0, 1.0]]), jnp.array([0])).round(4))
      [0.6931]

    Reference:
      Label smoothing: Szegedy et al., "Rethinking the Inception Architecture for
      Computer Vision", CVPR 2016, section 7.
    """
    check_fraction("label_smoothing", label_smoothing)
    _check_labels(logits, labels)
    if where is not None:
        check_mask(where, logits.shape[:-1], of="these logits")
    plain = isinstance(label_smoothing, int | float) and label_smoothing == 0
    if plain and _is_integer(labels):
        values = -_log_probability(logits, labels)
    else:
        values = _soft_cross_entropy(logits, labels, label_smoothing)
    return keep(values, where)


@rowwise
def _soft_cross_entropy(
    logits: Float[Array, "*batch k"], labels: Labels, smoothing: Scalar
) -> Float32[Array, "*batch"]:
    targets = _targets(labels, logits.shape[-1])
    targets = optax.losses.smooth_labels(targets, smoothing)
    return optax.losses.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def focal(
    logits: Float[Array, "*batch k"],
    labels: Labels,
    *,
    gamma: Scalar = 2.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float32[Array, "*batch"]:
    """Focal loss whose modulating factor carries no gradient.

        -(1 - stop_gradient(p_y))^gamma log p_y

    The paper differentiates the factor as well; the segmentation code behind HLFD
    detaches it, and so do we: the gradient is that of a weighted cross-entropy. Soft
    labels weight the focal terms of the classes.

    Args:
      logits: `[batch, classes]` or `[batch, height, width, classes]`.
      labels: integers of the shape of the logits without the class axis, or
        probabilities of the shape of the logits.
      gamma: exponent of the modulating factor; 0 gives the cross-entropy.
      where: which examples or pixels count; the others get 0.

    Returns:
      One float32 value per example, or per pixel.

    Raises:
      ValueError: labels fit neither shape, or `gamma` is negative.

    Reference:
      Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, Eq. 4.
    """
    if isinstance(gamma, int | float) and not gamma >= 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}")
    _check_labels(logits, labels)
    if where is not None:
        check_mask(where, logits.shape[:-1], of="these logits")
    if _is_integer(labels):
        values = _focal_terms(_log_probability(logits, labels), gamma)
    else:
        values = _soft_focal(logits, labels, gamma)
    return keep(values, where)


@rowwise
def _soft_focal(
    logits: Float[Array, "*batch k"], labels: Labels, gamma: Scalar
) -> Float32[Array, "*batch"]:
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    terms = labels.astype(jnp.float32) * _focal_terms(log_p, gamma)
    return jnp.sum(terms, axis=-1)


def _focal_terms(log_p: Float32[Array, "..."], gamma: Scalar) -> Float32[Array, "..."]:
    # A log-probability can round to just above 0, and a negative base would make a
    # fractional power NaN.
    miss = jnp.maximum(1.0 - jnp.exp(jax.lax.stop_gradient(log_p)), 0.0)
    return -(miss**gamma) * log_p


def dice(
    logits: Float[Array, "b ... k"],
    labels: Labels,
    *,
    smooth: Scalar = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "b"]:
    """Soft Dice loss of every example on its own.

        1 - (2 sum(P Y) + smooth) / (sum(P) + sum(Y) + smooth)
        P = softmax(z) without class 0,    Y = labels without class 0

    The sums run over the pixels and all foreground classes of one example together;
    class 0 is the background. An example without foreground has a finite value.

    Args:
      logits: `[batch, height, width, classes]`, at least two classes.
      labels: integers `[batch, height, width]`, or probabilities of the shape of the
        logits.
      smooth: added to both parts of the ratio.
      where: which pixels count, `[batch, height, width]`.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: fewer than two classes, labels of another shape, or `smooth` is not
        positive.

    Reference:
      Milletari et al., "V-Net", 3DV 2016, with unsquared denominators.
    """
    overlap, size = _foreground_sums(logits, labels, where)
    return _dice_of(overlap, size, smooth)


def batch_dice(
    logits: Float[Array, "b ... k"],
    labels: Labels,
    *,
    smooth: Scalar = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "b"]:
    """Soft Dice loss as one ratio over the whole batch, repeated for each example.

    The sums of `dice` also run over the batch, so an example without foreground costs
    little beside one that has some. Under jit over a sharded batch this is the global
    batch. The mean of the returned values is the loss that HLFD's code computes.

    Args:
      logits: `[batch, height, width, classes]`, at least two classes.
      labels: integers `[batch, height, width]`, or probabilities of the shape of the
        logits.
      smooth: added to both parts of the ratio.
      where: which pixels count, `[batch, height, width]`.

    Returns:
      float32 `[batch]`, all entries equal.

    Raises:
      ValueError: fewer than two classes, labels of another shape, or `smooth` is not
        positive.
    """
    overlap, size = _foreground_sums(logits, labels, where)
    value = _dice_of(jnp.sum(overlap), jnp.sum(size), smooth)
    return jnp.broadcast_to(value, overlap.shape)


def bce_dice(
    logits: Float[Array, "b ..."],
    targets: Num[Array, "b ..."] | Bool[Array, "b ..."],
    *,
    smooth: Scalar = 1e-7,
    denominator: Literal["squared", "plain"] = "squared",
    where: Bool[Array, "b ..."] | None = None,
) -> Float32[Array, "b"]:
    """Binary cross-entropy plus Dice of sigmoid maps: `binary_bce + binary_dice`.

    Args:
      logits: one logit per independent yes-or-no question, e.g. `[batch, height,
        width, 1]`; `foreground_logits` makes them from softmax logits.
      targets: 0 or 1 (or probabilities), of the shape of `logits`.
      smooth: of the Dice ratio.
      denominator: of the Dice ratio, see `binary_dice`.
      where: which entries count, of the shape of `logits`.

    Returns:
      float32 `[batch]`: the mean cross-entropy of each example plus the Dice loss of
      the batch.

    Raises:
      ValueError: shapes differ, or `smooth` is not positive.
    """
    return binary_bce(logits, targets, where=where) + binary_dice(
        logits, targets, smooth=smooth, denominator=denominator, where=where
    )


def binary_bce(
    logits: Float[Array, "b ..."],
    targets: Num[Array, "b ..."] | Bool[Array, "b ..."],
    *,
    where: Bool[Array, "b ..."] | None = None,
) -> Float32[Array, "b"]:
    """Mean sigmoid cross-entropy of each example, probabilities kept in [1e-7, 1-1e-7].

    Saturated logits therefore cost at most 16.1 each and get no gradient, as in the
    Keras code that the published numbers come from.

    Args:
      logits: `[batch, ...]`.
      targets: 0 or 1 (or probabilities), of the shape of `logits`.
      where: which entries count; an example with none has the value 0.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: shapes differ.
    """
    _check_binary(logits, targets, where)
    # Clipping the logit is clipping the probability, without rounding 1 - 1e-7.
    limit = 16.118095550958319
    clipped = jnp.clip(logits.astype(jnp.float32), -limit, limit)
    values = optax.losses.sigmoid_binary_cross_entropy(
        clipped, targets.astype(jnp.float32)
    )
    if where is None:
        return mean_per_example(values)
    count = sum_per_example(where.astype(jnp.float32))
    return sum_per_example(keep(values, where)) / jnp.maximum(count, 1.0)


def binary_dice(
    logits: Float[Array, "b ..."],
    targets: Num[Array, "b ..."] | Bool[Array, "b ..."],
    *,
    smooth: Scalar = 1e-7,
    denominator: Literal["squared", "plain"] = "squared",
    where: Bool[Array, "b ..."] | None = None,
) -> Float32[Array, "b"]:
    """Dice loss of sigmoid maps over the whole batch, repeated for each example.

        1 - (2 sum(t p) + smooth) / (sum(t^2) + sum(p^2) + smooth)

    Args:
      logits: `[batch, ...]`.
      targets: 0 or 1 (or probabilities), of the shape of `logits`.
      smooth: added to both parts of the ratio.
      denominator: `"squared"` as above, or `"plain"` for `sum(t) + sum(p)`.
      where: which entries count, of the shape of `logits`.

    Returns:
      float32 `[batch]`, all entries equal.

    Raises:
      ValueError: shapes differ, `smooth` is not positive or `denominator` unknown.
    """
    _check_binary(logits, targets, where)
    if denominator not in ("squared", "plain"):
        raise ValueError(
            f"denominator must be 'squared' or 'plain', got {denominator!r}"
        )
    p = keep(jax.nn.sigmoid(logits.astype(jnp.float32)), where)
    t = keep(targets.astype(jnp.float32), where)
    size = t**2 + p**2 if denominator == "squared" else t + p
    value = _dice_of(jnp.sum(t * p), jnp.sum(size), smooth)
    return jnp.broadcast_to(value, logits.shape[:1])


def foreground_logits(
    logits: Float[Array, "*batch k"],
) -> Float32[Array, "*batch foreground"]:
    """Logits of "this class, not any other" for every class but the background.

    Their sigmoid is the softmax probability: `z_c - logsumexp(z of the others)`.

    Args:
      logits: softmax logits, at least two classes, class 0 the background.

    Returns:
      float32, one class less.

    Raises:
      ValueError: fewer than two classes.
    """
    classes = logits.shape[-1]
    _check_foreground(classes)
    z = logits.astype(jnp.float32)
    others = [
        jax.nn.logsumexp(jnp.delete(z, c, axis=-1), axis=-1) for c in range(1, classes)
    ]
    return z[..., 1:] - jnp.stack(others, axis=-1)


def _foreground_sums(
    logits: Float[Array, "b ... k"], labels: Labels, where: Bool[Array, "..."] | None
) -> tuple[Float32[Array, "b"], Float32[Array, "b"]]:
    """The sums of P Y and of P + Y over pixels and foreground classes."""
    _check_labels(logits, labels)
    _check_foreground(logits.shape[-1])
    if where is not None:
        check_mask(where, logits.shape[:-1], of="these logits")
    if _is_integer(labels):
        overlap, size = _foreground_of_classes(logits, labels)
    else:
        p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)[..., 1:]
        y = labels.astype(jnp.float32)[..., 1:]
        overlap, size = jnp.sum(p * y, axis=-1), jnp.sum(p + y, axis=-1)
    return sum_per_example(keep(overlap, where)), sum_per_example(keep(size, where))


def _foreground_of_classes(
    logits: Float[Array, "*batch k"], labels: Labels
) -> tuple[Float32[Array, "*batch"], Float32[Array, "*batch"]]:
    """The sums of P Y and of P + Y of every pixel, without an array of either.

    A label that is no class has Y = 0, as one-hot labels have.
    """
    foreground = (labels > 0) & (labels < logits.shape[-1])
    own = jnp.where(foreground, labels, 0)
    overlap = jnp.where(foreground, jnp.exp(_log_probability(logits, own)), 0.0)
    background = _log_probability(logits, jnp.zeros_like(labels))
    return overlap, -jnp.expm1(background) + foreground


@functools.partial(rowwise, narrow_only=True)
def _log_probability(
    logits: Float[Array, "*batch k"], labels: Labels
) -> Float32[Array, "*batch"]:
    """The log-probability of the label; NaN for a label that is no class."""
    logits = logits.astype(jnp.float32)
    maximum, log_sum = log_normalizer(logits)
    return (pick(logits, labels) - maximum) - log_sum


def _dice_of(
    overlap: Float32[Array, "..."], size: Float32[Array, "..."], smooth: Scalar
) -> Float32[Array, "..."]:
    check_positive("smooth", smooth)
    return 1.0 - (2.0 * overlap + smooth) / (size + smooth)


def _is_integer(labels: Labels) -> bool:
    return jnp.issubdtype(labels.dtype, jnp.integer)


def _targets(labels: Labels, classes: int) -> Float32[Array, "..."]:
    if _is_integer(labels):
        return jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    return labels.astype(jnp.float32)


def _check_labels(logits: Float[Array, "..."], labels: Labels) -> None:
    integer = _is_integer(labels)
    expected = logits.shape[:-1] if integer else logits.shape
    if labels.shape != expected:
        raise ValueError(
            f"{'integer' if integer else 'soft'} labels have shape {labels.shape}; "
            f"logits of shape {logits.shape} need {expected}"
        )


def _check_binary(
    logits: Float[Array, "..."],
    targets: Num[Array, "..."] | Bool[Array, "..."],
    where: Bool[Array, "..."] | None,
) -> None:
    if logits.shape != targets.shape:
        raise ValueError(
            f"logits have shape {logits.shape} and targets {targets.shape}; "
            f"a sigmoid loss needs one target per logit"
        )
    if where is not None:
        check_mask(where, logits.shape, of="these logits")


def _check_foreground(classes: int) -> None:
    if classes < 2:
        raise ValueError(
            f"a segmentation loss needs a background and a foreground class, "
            f"got {classes} class"
        )
