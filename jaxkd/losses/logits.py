"""Losses between the logits of a student and those of a teacher.

All work on `[batch, classes]` and, pixel by pixel, on `[batch, height, width,
classes]`. Both sides go through `log_softmax`, never `log(softmax)`: equal inputs give
exactly zero and no probability that underflows can make a gradient NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32

from jaxkd.losses.checks import (
    Scalar,
    check_logits,
    check_positive,
    keep,
    split_mask,
    without_classes,
)


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
    log_p = _log_probabilities(student, temperature, classes)
    log_q = _log_probabilities(teacher, temperature, classes)
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
    log_p = _log_probabilities(student, temperature, classes)
    log_q = _log_probabilities(jax.lax.stop_gradient(teacher), temperature, classes)
    cross = -jnp.sum(jnp.exp(log_q) * log_p, axis=-1)
    return keep(temperature**2 * cross, examples)


def _log_probabilities(
    logits: Float[Array, "..."],
    temperature: Scalar,
    classes: Bool[Array, "..."] | None,
) -> Float32[Array, "..."]:
    softened = logits.astype(jnp.float32) / temperature
    return jax.nn.log_softmax(without_classes(softened, classes), axis=-1)
