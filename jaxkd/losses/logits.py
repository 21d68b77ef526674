"""Losses between the logits of a student and those of a teacher.

All work on `[batch, classes]` and, pixel by pixel, on `[batch, height, width,
classes]`. Both sides go through `log_softmax`, never `log(softmax)`: equal inputs give
exactly zero and no probability that underflows can make a gradient NaN. A logit of
-inf takes its class out, as `where=` does: where the teacher has it too, or alone, the
value and the gradients stay finite.
"""

from __future__ import annotations

import functools

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
    split_mask,
    without_classes,
)
from jaxkd.losses.supervised import Labels, cross_entropy


@rowwise
def softened_kl(
    student: Float[Array, "*batch k"],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "*batch"]:
    """Divergence of two softened distributions, differentiable in both arguments.

        T^2 * sum_k q_k (log q_k - log p_k)
        q = softmax(teacher / T),    p = softmax(student / T)

    `kd` is this value with a constant teacher; networks that teach each other choose
    themselves where gradients stop.

    Args:
      student: logits, any float type; computed in float32.
      teacher: logits of the same shape.
      temperature: divides both; the factor T^2 keeps gradients of one size.
      where: which examples or pixels count (shape of the logits without the last
        axis; the others get 0), or which classes (shape of the logits).

    Returns:
      One float32 value per example or pixel, zero for a single class.

    Raises:
      ValueError: shapes or class counts differ, or `temperature` is not positive.
    """
    check_positive("temperature", temperature)
    check_logits(student, teacher)
    examples, classes = split_mask(where, student.shape)
    log_p = log_probabilities(student, temperature, classes)
    log_q = log_probabilities(teacher, temperature, classes)
    divergence = optax.losses.kl_divergence_with_log_targets(log_p, log_q)
    return keep(temperature**2 * divergence, examples)


def kd(
    student: Float[Array, "*batch k"],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar = 4.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "*batch"]:
    """Knowledge distillation of softened logits (Hinton et al., 2015, section 2).

        T^2 * KL(softmax(teacher / T) || softmax(student / T))

    The sum runs over classes. Several code bases average over them instead, which is
    `k` times smaller; multiply the weight accordingly when comparing.

    Args:
      student: logits `[batch, classes]` or `[batch, height, width, classes]`.
      teacher: logits of the same shape; no gradient reaches them.
      temperature: softens both distributions.
      where: which examples or pixels count (shape of the logits without the last
        axis), or which classes (shape of the logits).

    Returns:
      One float32 value per example, or per pixel.

    Raises:
      ValueError: shapes or class counts differ, or `temperature` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 0.0]])
      >>> print(kd(student, teacher, temperature=2.0).round(4))
      [0.4438]

    Reference:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    return softened_kl(
        student,
        jax.lax.stop_gradient(teacher),
        temperature=temperature,
        where=where,
    )


@rowwise
def kd_cross_entropy(
    student: Float[Array, "*batch k"],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar = 4.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "*batch"]:
    """Knowledge distillation in cross-entropy form, without the teacher's entropy.

        -T^2 * sum_k q_k log p_k

    Its gradient is that of `kd`; its value has the teacher's entropy as a floor, so
    equal logits do not give zero.

    Args:
      student: logits `[batch, classes]` or `[batch, height, width, classes]`.
      teacher: logits of the same shape; no gradient reaches them.
      temperature: softens both distributions.
      where: which examples or pixels count (shape of the logits without the last
        axis), or which classes (shape of the logits).

    Returns:
      One float32 value per example, or per pixel.

    Raises:
      ValueError: shapes or class counts differ, or `temperature` is not positive.

    Reference:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    check_positive("temperature", temperature)
    check_logits(student, teacher)
    examples, classes = split_mask(where, student.shape)
    log_p = log_probabilities(student, temperature, classes)
    log_q = log_probabilities(jax.lax.stop_gradient(teacher), temperature, classes)
    cross = -jnp.sum(jnp.exp(log_q) * log_p, axis=-1)
    return keep(temperature**2 * cross, examples)


@rowwise
def wsld(
    student: Float[Array, "*batch k"],
    teacher: Float[Array, "..."],
    labels: Labels,
    *,
    temperature: Scalar = 2.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "*batch"]:
    """Distillation weighted by how far the student is behind (Zhou et al., 2021).

        (1 - exp(-CE(student) / CE(teacher))) * kd_cross_entropy(student, teacher)

    with both cross-entropies against the labels, at temperature 1 and constant:
    examples that the student already knows better than the teacher count less, which
    balances the variance that soft labels remove against the bias they add.

    Args:
      student: logits `[batch, classes]` or `[batch, height, width, classes]`.
      teacher: logits of the same shape; no gradient reaches them.
      labels: integers of the shape of the logits without the class axis, or
        probabilities of the shape of the logits.
      temperature: softens both distributions; the value carries its square.
      where: which examples or pixels count; the others get 0.

    Returns:
      One float32 value per example, or per pixel.

    Raises:
      ValueError: shapes or class counts differ, or `temperature` is not positive.

    Reference:
      Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
      Tradeoff Perspective", ICLR 2021.
    """
    if where is not None:
        check_mask(where, student.shape[:-1], of="these logits")
    soft = kd_cross_entropy(student, teacher, temperature=temperature)
    student, teacher = (
        finite_logits(jax.lax.stop_gradient(x)) for x in (student, teacher)
    )
    # The published code's guard against a teacher that is certain.
    ratio = cross_entropy(student, labels) / (cross_entropy(teacher, labels) + 1e-7)
    return keep(-jnp.expm1(-ratio) * soft, where)


@functools.partial(rowwise, narrow_only=True)
def hard_distillation(
    student: Float[Array, "*batch k"],
    teacher: Float[Array, "..."],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "*batch"]:
    """Cross-entropy against the teacher's decision (Touvron et al., 2021, Eq. 3).

        -log softmax(student)[argmax teacher]

    Args:
      student: logits `[batch, classes]` or `[batch, height, width, classes]`.
      teacher: logits of the same shape; no gradient reaches them.
      where: which examples or pixels count; the others get 0.

    Returns:
      One float32 value per example, or per pixel.

    Raises:
      ValueError: shapes or class counts differ.

    Reference:
      Touvron et al., "Training data-efficient image transformers & distillation
      through attention", ICML 2021.
    """
    check_logits(student, teacher)
    return cross_entropy(
        finite_logits(student), jnp.argmax(teacher, axis=-1), where=where
    )


def finite_logits(logits: Float[Array, "..."]) -> Float32[Array, "..."]:
    """Logits in float32, with a large finite number in the place of -inf.

    The softmax is the same; `0 * log 0` is 0 and differences of excluded classes are 0.
    No gradient reaches a logit of -inf. NaN and +inf pass.
    """
    logits = logits.astype(jnp.float32)
    return without_classes(logits, ~jnp.isneginf(logits))


def log_probabilities(
    logits: Float[Array, "..."],
    temperature: Scalar = 1.0,
    classes: Bool[Array, "..."] | None = None,
) -> Float32[Array, "..."]:
    """Finite log-softmax of softened logits, over the classes that take part."""
    softened = finite_logits(logits.astype(jnp.float32) / temperature)
    return jax.nn.log_softmax(without_classes(softened, classes), axis=-1)
