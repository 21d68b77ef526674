"""Losses that treat the target class and the other classes apart: DKD and NKD.

Both split a softmax into "the target or another class" and "which other class". The
second part is the softmax over the classes but the target, which is computed by taking
the target out of the softmax and not by dividing probabilities. Each part is a function
of its own; `dkd` and `nkd` are their sums with the published weights.

Labels are class indices, or label vectors of mixed images. Of a vector only the largest
entry is the target; its size is not used.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32

from jaxkd.losses.blocks import rowwise
from jaxkd.losses.checks import (
    Scalar,
    check_logits,
    check_mask,
    check_positive,
    keep,
    without_classes,
)
from jaxkd.losses.logits import finite_logits, log_probabilities
from jaxkd.losses.supervised import Labels


@rowwise
def dkd(
    student: Float[Array, "*batch k"],
    teacher: Float[Array, "..."],
    labels: Labels,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    temperature: Scalar = 4.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "*batch"]:
    """Weighted target and non-target divergence (Zhao et al., 2022, Eq. 7).

        alpha * dkd_target + beta * dkd_nontarget

    With alpha = 1 and beta = 1 - q_y this would be `kd`, whose non-target part is
    suppressed by a confident teacher.

    Args:
      student: logits `[batch, classes]` or `[batch, height, width, classes]`.
      teacher: logits of the same shape; no gradient reaches them.
      labels: class indices (shape of the logits without the last axis), or label
        vectors (shape of the logits) whose largest entry is the target.
      alpha: factor of the target part.
      beta: factor of the non-target part.
      temperature: softens both distributions; both parts carry its square.
      where: which examples or pixels count; the others get 0.

    Returns:
      One float32 value per example, or per pixel.

    Raises:
      ValueError: shapes or class counts differ, or `temperature` is not positive.

    Example:
      >>> student, teacher = jnp.zeros((1, 3)), jnp.array([[0.0, 2.0, 0.0]])
      >>> print(dkd(student, teacher, jnp.array([0]), temperature=1.0).round(4))
      [2.7626]

    Reference:
      Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022.
    """
    return alpha * dkd_target(
        student, teacher, labels, temperature=temperature, where=where
    ) + beta * dkd_nontarget(
        student, teacher, labels, temperature=temperature, where=where
    )


@rowwise
def dkd_target(
    student: Float[Array, "*batch k"],
    teacher: Float[Array, "..."],
    labels: Labels,
    *,
    temperature: Scalar = 4.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "*batch"]:
    """Divergence of "the target or another class" (Zhao et al., 2022, TCKD).

        T^2 * KL([q_y, 1 - q_y] || [p_y, 1 - p_y])
        q = softmax(teacher / T),    p = softmax(student / T)

    Arguments, result and errors are those of `dkd`.
    """
    target = _checked_target(student, teacher, labels, temperature, where)

    def log_odds(logits: Float[Array, "..."]) -> Float32[Array, "..."]:
        """The log of p_y / (1 - p_y), without rounding 1 - p_y."""
        z = finite_logits(logits.astype(jnp.float32) / temperature)
        others = jax.nn.logsumexp(without_classes(z, ~target), axis=-1)
        return jnp.sum(jnp.where(target, z, 0.0), axis=-1) - others

    own = log_odds(student)
    wanted = log_odds(jax.lax.stop_gradient(teacher))
    log_p, log_not_p = jax.nn.log_sigmoid(own), jax.nn.log_sigmoid(-own)
    log_q, log_not_q = jax.nn.log_sigmoid(wanted), jax.nn.log_sigmoid(-wanted)
    divergence = jnp.exp(log_q) * (log_q - log_p) + jnp.exp(log_not_q) * (
        log_not_q - log_not_p
    )
    return keep(temperature**2 * divergence, where)


@rowwise
def dkd_nontarget(
    student: Float[Array, "*batch k"],
    teacher: Float[Array, "..."],
    labels: Labels,
    *,
    temperature: Scalar = 4.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "*batch"]:
    """Divergence of the distributions over the other classes (Zhao et al., NCKD).

        T^2 * KL(softmax_{k != y}(teacher / T) || softmax_{k != y}(student / T))

    The authors' code subtracts 1000 from the target's logit; here the class is left
    out, which also holds for logits above 1000. Zero for one or two classes. Arguments,
    result and errors are those of `dkd`.
    """
    target = _checked_target(student, teacher, labels, temperature, where)
    teacher = jax.lax.stop_gradient(teacher)
    log_p = log_probabilities(student, temperature, ~target)
    log_q = log_probabilities(teacher, temperature, ~target)
    divergence = optax.losses.kl_divergence_with_log_targets(log_p, log_q)
    return keep(temperature**2 * divergence, where)


@rowwise
def nkd(
    student: Float[Array, "*batch k"],
    teacher: Float[Array, "..."],
    labels: Labels,
    *,
    gamma: Scalar = 1.5,
    temperature: Scalar = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "*batch"]:
    """Normalised knowledge distillation (Yang et al., 2023).

        nkd_target + gamma * nkd_nontarget

    Both parts are cross-entropies: the teacher's entropy is not subtracted, so equal
    logits do not give zero.

    Args:
      student: logits `[batch, classes]` or `[batch, height, width, classes]`.
      teacher: logits of the same shape; no gradient reaches them.
      labels: class indices (shape of the logits without the last axis), or label
        vectors (shape of the logits) whose largest entry is the target.
      gamma: factor of the non-target part.
      temperature: softens the non-target part, which carries its square.
      where: which examples or pixels count; the others get 0.

    Returns:
      One float32 value per example, or per pixel.

    Raises:
      ValueError: shapes or class counts differ, or `temperature` is not positive.

    Example:
      >>> student, teacher = jnp.zeros((1, 3)), jnp.zeros((1, 3))
      >>> print(nkd(student, teacher, jnp.array([0])).round(4))
      [1.4059]

    Reference:
      Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A
      Unified Approach with Normalized Loss and Customized Soft Labels", ICCV 2023.
    """
    return nkd_target(student, teacher, labels, where=where) + gamma * nkd_nontarget(
        student, teacher, labels, temperature=temperature, where=where
    )


@rowwise
def nkd_target(
    student: Float[Array, "*batch k"],
    teacher: Float[Array, "..."],
    labels: Labels,
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "*batch"]:
    """Cross-entropy of the target class, weighted by the teacher's confidence in it.

        -softmax(teacher)_y * log softmax(student)_y

    Without temperature. Arguments, result and errors are those of `nkd`.
    """
    target = _checked_target(student, teacher, labels, 1.0, where)
    log_p = log_probabilities(student)
    confidence = jnp.exp(log_probabilities(jax.lax.stop_gradient(teacher)))
    return keep(-jnp.sum(jnp.where(target, confidence * log_p, 0.0), axis=-1), where)


@rowwise
def nkd_nontarget(
    student: Float[Array, "*batch k"],
    teacher: Float[Array, "..."],
    labels: Labels,
    *,
    temperature: Scalar = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "*batch"]:
    """Cross-entropy of the distributions over the other classes.

        -T^2 * sum_{k != y} q_k log p_k
        q = softmax_{k != y}(teacher / T),    p = softmax_{k != y}(student / T)

    Zero for one or two classes. Arguments, result and errors are those of `nkd`.
    """
    target = _checked_target(student, teacher, labels, temperature, where)
    teacher = jax.lax.stop_gradient(teacher)
    log_p = log_probabilities(student, temperature, ~target)
    q = jnp.exp(log_probabilities(teacher, temperature, ~target))
    return keep(-(temperature**2) * jnp.sum(q * log_p, axis=-1), where)


def _checked_target(
    student: Float[Array, "..."],
    teacher: Float[Array, "..."],
    labels: Labels,
    temperature: Scalar,
    where: Bool[Array, "..."] | None,
) -> Bool[Array, "..."]:
    """Whether a class is the target, in the shape of the logits."""
    check_positive("temperature", temperature)
    check_logits(student, teacher)
    if where is not None:
        check_mask(where, student.shape[:-1], of="these logits")
    if labels.shape not in (student.shape, student.shape[:-1]):
        raise ValueError(
            f"labels have shape {labels.shape}; logits of shape {student.shape} need "
            f"{student.shape[:-1]} for class indices or {student.shape} for vectors"
        )
    if labels.ndim == student.ndim:
        labels = jnp.argmax(labels, axis=-1)
    return jax.nn.one_hot(labels, student.shape[-1], dtype=bool)
