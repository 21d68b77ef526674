"""Losses of networks that learn without a larger teacher.

The soft labels come from the student itself (USKD, PS-KD), from a rule (Tf-KD), from
its own deepest classifier (BYOT) or from a network that learns beside it (DML). Labels
are class indices, or soft labels of mixed images.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Integer

from jaxkd.losses.blocks import rowwise
from jaxkd.losses.checks import (
    Scalar,
    check_choice,
    check_fraction,
    check_logits,
    check_mask,
    check_positive,
    keep,
    sum_per_example,
)
from jaxkd.losses.logits import kd, log_probabilities, softened_kl
from jaxkd.losses.soft_labels import soft_cross_entropy
from jaxkd.losses.supervised import Labels, cross_entropy


def uskd_target(student: Float[Array, "b k"], labels: Labels) -> Float32[Array, "b"]:
    """Target part of USKD: the label, smoothed by the student's own confidence.

        -sum_c P_c log p_c
        P_c = p_c^2 + y_c - mean_batch(p_c^2),    p = softmax(student)

    over the target classes c: the label, or the two largest entries of a soft label
    (where an entry is 0, so is P). P carries no gradient. The mean couples the batch:
    alone, an example has P = y.

    Args:
      student: logits `[batch, classes]`.
      labels: class indices `[batch]`, or soft labels `[batch, classes]`.

    Returns:
      float32 `[batch]`; a value can be negative where P is.

    Raises:
      ValueError: labels fit neither shape.

    Example:
      >>> print(uskd_target(jnp.array([[0.0, 0.0]]), jnp.array([1])).round(4))
      [0.6931]

    Reference:
      Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A
      Unified Approach with Normalized Loss and Customized Soft Labels", ICCV 2023.
    """
    index, share = _target_classes(labels, student.shape)
    log_p = jnp.take_along_axis(log_probabilities(student), index, axis=-1)
    squared = jnp.exp(2 * jax.lax.stop_gradient(log_p))
    soft = squared + share - jnp.mean(squared, axis=0, keepdims=True)
    soft = jnp.where(share == 0, 0.0, soft)
    return -jnp.sum(soft * log_p, axis=-1)


@rowwise
def uskd_nontarget(
    student: Float[Array, "b k"],
    weak: Float[Array, "..."],
    labels: Labels,
    *,
    rank: Literal["logprob", "prob"] = "logprob",
) -> Float32[Array, "b"]:
    """Non-target part of USKD: Zipf's law over the ranks of the other classes.

        -sum_{k not target} q_k log softmax_{k not target}(student)_k
        q_k ~ 1 / position_k,    positions by descending r
        r = w / (1 - w_target + 1e-6) + s / (1 - s_target + 1e-6)

    with w the softmax of the weak head and s the student's log-probabilities. The
    target takes part in the ranking, so its position is left out of the sequence. No
    gradient passes through q. Of equal ranks the lower class comes first. A class
    whose student logit is -inf takes no part.

    Args:
      student: logits `[batch, classes]`.
      weak: logits of the weak head, of the same shape.
      labels: class indices `[batch]`, or soft labels `[batch, classes]`, whose two
        largest entries are the targets.
      rank: `"logprob"` as the code computes s, `"prob"` for the student's
        probabilities, as the paper writes it.

    Returns:
      float32 `[batch]`; 0 if every class is a target.

    Raises:
      ValueError: shapes differ, or labels fit neither shape.

    Reference:
      Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A
      Unified Approach with Normalized Loss and Customized Soft Labels", ICCV 2023.
    """
    check_logits(student, weak)
    index, _ = _target_classes(labels, student.shape)
    targets = jnp.sum(jax.nn.one_hot(index, student.shape[-1]), axis=1) > 0
    others = ~targets & ~jnp.isneginf(student)

    s = jax.lax.stop_gradient(log_probabilities(student))
    check_choice("rank", rank, ("logprob", "prob"))
    if rank == "prob":
        s = jnp.exp(s)
    w = jnp.exp(jax.lax.stop_gradient(log_probabilities(weak)))
    order = jnp.argsort(-_normalized(w, targets) - _normalized(s, targets), axis=-1)
    position = jnp.argsort(order, axis=-1) + 1
    zipf = jnp.where(others, 1.0 / position, 0.0)
    total = jnp.sum(zipf, axis=-1, keepdims=True)
    q = zipf / jnp.where(total > 0, total, 1.0)
    return -jnp.sum(q * log_probabilities(student, 1.0, others), axis=-1)


def uskd_weak(weak: Float[Array, "b k"], labels: Labels) -> Float32[Array, "b"]:
    """Cross-entropy that trains USKD's weak head: labels smoothed by 0.1.

    Args:
      weak: logits of the weak head, `[batch, classes]`.
      labels: class indices `[batch]`, or soft labels `[batch, classes]`.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: labels fit neither shape.
    """
    return cross_entropy(weak, labels, label_smoothing=0.1)


def pskd_targets(
    past: Float[Array, "b k"], labels: Labels, *, alpha: Scalar
) -> Float32[Array, "b k"]:
    """Soft labels of progressive self-distillation (Kim et al., 2021).

        (1 - alpha) y + alpha p_past

    Args:
      past: the student's probabilities of an earlier epoch, `[batch, classes]`; no
        gradient reaches them.
      labels: class indices `[batch]`, or soft labels `[batch, classes]`.
      alpha: trust in the past, from 0 to 1.

    Returns:
      float32 `[batch, classes]`.

    Raises:
      ValueError: labels fit neither shape, or `alpha` is outside [0, 1].
    """
    check_fraction("alpha", alpha)
    past = jax.lax.stop_gradient(past).astype(jnp.float32)
    y = _soft(labels, past.shape)
    return (1.0 - alpha) * y + alpha * past


@rowwise
def pskd(
    student: Float[Array, "b k"],
    past: Float[Array, "..."],
    labels: Labels,
    *,
    alpha: Scalar,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "b"]:
    """Cross-entropy with labels softened by the student's past (Kim et al., 2021).

        -sum_k ((1 - alpha) y + alpha p_past)_k log softmax(student)_k

    Args:
      student: logits `[batch, classes]`.
      past: the student's probabilities of an earlier epoch; no gradient reaches them.
      labels: class indices `[batch]`, or soft labels `[batch, classes]`.
      alpha: trust in the past, from 0 to 1.
      where: which examples count; the others get 0.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: shapes differ, or `alpha` is outside [0, 1].

    Reference:
      Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets",
      ICCV 2021.
    """
    check_logits(student, past)
    targets = pskd_targets(past, labels, alpha=alpha)
    return soft_cross_entropy(student, targets, where=where)


@rowwise
def tfkd_regularization(
    student: Float[Array, "b k"],
    labels: Labels,
    *,
    correct_probability: Scalar = 0.99,
    temperature: Scalar = 20.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "b"]:
    """Divergence from a virtual teacher made of the label (Yuan et al., 2020).

        1/K KL(softmax(v / T) || softmax(student))
        v = correct_probability on the label, equal shares on the other classes

    The code's form: the temperature softens the virtual teacher's probabilities, which
    makes it almost uniform, the student is not softened, and the divergence is a mean
    over classes.

    Args:
      student: logits `[batch, classes]`.
      labels: class indices `[batch]`, or soft labels `[batch, classes]`, which mix
        virtual teachers.
      correct_probability: of the label.
      temperature: divides the virtual teacher's probabilities.
      where: which examples count; the others get 0.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: labels fit neither shape, `correct_probability` is outside [0, 1] or
        `temperature` is not positive.

    Reference:
      Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing
      Regularization", CVPR 2020.
    """
    check_fraction("correct_probability", correct_probability)
    check_positive("temperature", temperature)
    y = _soft(labels, student.shape)
    classes = student.shape[-1]
    other = (1.0 - correct_probability) / max(classes - 1, 1)
    virtual = correct_probability * y + other * (1.0 - y)
    # The divergence of two softmaxes; the first one's logits are v / T.
    value = softened_kl(student, virtual / temperature)
    if where is not None:
        check_mask(where, student.shape[:-1], of="these logits")
    return keep(value / classes, where)


def tfkd_self(
    student: Float[Array, "b k"],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar = 6.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "b"]:
    """Hinton's divergence as a mean over classes (Yuan et al., 2020).

        T^2 / K KL(softmax(teacher / T) || softmax(student / T))

    The teacher is a copy of the student's network, trained before.

    Args:
      student: logits `[batch, classes]`.
      teacher: logits of the same shape; no gradient reaches them.
      temperature: softens both distributions.
      where: as in `kd`.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: shapes differ, or `temperature` is not positive.

    Reference:
      Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing
      Regularization", CVPR 2020.
    """
    value = kd(student, teacher, temperature=temperature, where=where)
    return value / student.shape[-1]


def byot_feature(
    early: Float[Array, "b c"], final: Float[Array, "..."]
) -> Float32[Array, "b"]:
    """Hint of the deepest features to an early classifier (Zhang et al., 2019).

        batch * sum_c [early_c > 0 or final_c > 0] (early_c - final_c)^2

    The factor makes the mean over the batch the sum over everything, which is how the
    re-implementation behind the usual weight 1e-6 reduces; the loss thus grows with
    the (global) batch.

    Args:
      early: features of an early classifier.
      final: features of the last one, of the same shape; no gradient reaches them.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: shapes differ.

    Reference:
      Zhang et al., "Be Your Own Teacher: Improve the Performance of Convolutional
      Neural Networks via Self Distillation", ICCV 2019.
    """
    if early.shape != final.shape:
        raise ValueError(
            f"early features have shape {early.shape} and final features "
            f"{final.shape}; they must be equal"
        )
    early = early.astype(jnp.float32)
    final = jax.lax.stop_gradient(final).astype(jnp.float32)
    active = (early > 0) | (final > 0)
    squares = jnp.where(active, jnp.square(early - final), 0.0)
    return early.shape[0] * sum_per_example(squares)


def dml(
    student: Float[Array, "b k"], peer: Float[Array, "..."], *, eps: float = 0.0
) -> Float32[Array, "b"]:
    """What one student learns from another that learns beside it (Zhang et al., 2018).

        KL(softmax(peer) || softmax(student))

    Args:
      student: logits `[batch, classes]`.
      peer: the other student's logits; no gradient reaches them.
      eps: 1e-8 gives the authors' code, `sum p_peer log(eps + p_peer / (p + eps))`.
        It bounds the loss, and takes the gradient from a student whose probability is
        below eps; 0 is the divergence itself.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: shapes differ, or `eps` is negative.

    Reference:
      Zhang et al., "Deep Mutual Learning", CVPR 2018.
    """
    check_logits(student, peer)
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if eps == 0:
        return kd(student, peer, temperature=1.0)
    p = jax.nn.softmax(student.astype(jnp.float32), axis=-1)
    q = jax.nn.softmax(jax.lax.stop_gradient(peer).astype(jnp.float32), axis=-1)
    return jnp.sum(q * jnp.log(eps + q / (p + eps)), axis=-1)


def _target_classes(
    labels: Labels, shape: tuple[int, ...]
) -> tuple[Integer[Array, "b targets"], Float32[Array, "b targets"]]:
    """USKD's target classes and their shares: the label, or the two largest entries."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        _soft(labels, shape)
        index = labels[:, None]
        return index, jnp.ones(index.shape, jnp.float32)
    share, index = jax.lax.top_k(_soft(labels, shape), min(2, shape[-1]))
    return index, jax.lax.stop_gradient(share)


def _normalized(
    values: Float32[Array, "b k"], targets: Bool[Array, "b k"]
) -> Float32[Array, "b k"]:
    of_targets = jnp.sum(jnp.where(targets, values, 0.0), axis=-1, keepdims=True)
    return values / (1.0 - of_targets + 1e-6)


def _soft(labels: Labels, shape: tuple[int, ...]) -> Float32[Array, "b k"]:
    """Labels as a distribution over classes, `[batch, classes]`."""
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    expected = shape[:-1] if integer else shape
    if len(shape) != 2 or labels.shape != expected:
        raise ValueError(
            f"{'integer' if integer else 'soft'} labels have shape {labels.shape}; "
            f"logits [batch, classes] of shape {shape} need {expected}"
        )
    if integer:
        return jax.nn.one_hot(labels, shape[-1], dtype=jnp.float32)
    return labels.astype(jnp.float32)
