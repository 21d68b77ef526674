"""Losses with several teachers: sums, averages, and averages by confidence.

Teachers come as a sequence of logits of one shape. Confidence weights are arrays
`[teachers, batch]`; they are constants that a loss takes as it takes a label.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from jaxkd.losses.checks import Scalar, check_positive, mean_per_example
from jaxkd.losses.logits import finite_logits, kd, log_probabilities
from jaxkd.losses.supervised import Labels, cross_entropy


def function_matching(
    student: Float[Array, "*batch k"],
    teachers: Sequence[Float[Array, "..."]],
    *,
    temperature: Scalar = 1.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "*batch"]:
    """Sum over the teachers of their softened divergence (Beyer et al., 2022).

        sum_i T^2 * KL(softmax(teacher_i / T) || softmax(student / T))

    Args:
      student: logits `[batch, classes]` or `[batch, height, width, classes]`.
      teachers: logits of the same shape; no gradient reaches them.
      temperature: softens all distributions.
      where: which examples or pixels count; the others get 0.

    Returns:
      One float32 value per example, or per pixel.

    Raises:
      ValueError: no teachers, shapes or class counts differ, or `temperature` is not
        positive.

    Reference:
      Beyer et al., "Knowledge Distillation: A Good Teacher Is Patient and
      Consistent", CVPR 2022.
    """
    divergences = each_kd(student, teachers, temperature=temperature, where=where)
    return jnp.sum(divergences, axis=0)


def each_kd(
    student: Float[Array, "*batch k"],
    teachers: Sequence[Float[Array, "..."]],
    *,
    temperature: Scalar = 4.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "teachers *batch"]:
    """`kd` with each teacher, stacked: `[teachers, batch, ...]`.

    Arguments and errors are those of `function_matching`.
    """
    _check_teachers(teachers)
    return jnp.stack(
        [kd(student, t, temperature=temperature, where=where) for t in teachers]
    )


def averaged_kd(
    student: Float[Array, "*batch k"],
    teachers: Sequence[Float[Array, "..."]],
    *,
    shares: Sequence[float] | None = None,
    temperature: Scalar = 4.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "*batch"]:
    """Average of the divergences from several teachers (AVER, You et al., 2017).

        sum_i a_i * T^2 * KL(softmax(teacher_i / T) || softmax(student / T))

    Args:
      student: logits `[batch, classes]` or `[batch, height, width, classes]`.
      teachers: logits of the same shape; no gradient reaches them.
      shares: factors a_i before they are scaled to sum to one; None for equal ones.
      temperature: softens all distributions.
      where: which examples or pixels count; the others get 0.

    Returns:
      One float32 value per example, or per pixel.

    Raises:
      ValueError: no teachers, a wrong number of shares, shapes or class counts differ,
        or `temperature` is not positive.

    Reference:
      You et al., "Learning from Multiple Teacher Networks", KDD 2017.
    """
    divergences = each_kd(student, teachers, temperature=temperature, where=where)
    return jnp.tensordot(_normalized(shares, len(teachers)), divergences, axes=1)


def averaged_logits(
    teachers: Sequence[Float[Array, "..."]], *, shares: Sequence[float] | None = None
) -> Float32[Array, "..."]:
    """Average of the teachers' logits: a geometric mean of their distributions.

    Args:
      teachers: logits of one shape. A class that one teacher excludes by -inf stays
        excluded.
      shares: factors before they are scaled to sum to one; None for equal ones.

    Returns:
      float32 of the shape of one teacher's logits.

    Raises:
      ValueError: no teachers, shapes that differ, or a wrong number of shares.
    """
    factors = _normalized(shares, len(teachers))
    return jnp.tensordot(factors, _stacked(teachers), axes=1)


def averaged_probabilities(
    teachers: Sequence[Float[Array, "..."]],
    *,
    shares: Sequence[float] | None = None,
    temperature: Scalar = 1.0,
) -> Float32[Array, "..."]:
    """Logits whose softened softmax is the average of the teachers' softmaxes.

        T * log sum_i a_i softmax(teacher_i / T)

    Args:
      teachers: logits of one shape.
      shares: factors a_i before they are scaled to sum to one; None for equal ones.
      temperature: the T at which the result will be softened.

    Returns:
      float32 of the shape of one teacher's logits.

    Raises:
      ValueError: no teachers, shapes that differ, a wrong number of shares, or
        `temperature` is not positive.
    """
    check_positive("temperature", temperature)
    log_q = log_probabilities(_stacked(teachers), temperature)
    factors = _normalized(shares, len(teachers))
    factors = factors.reshape((-1,) + (1,) * (log_q.ndim - 1))
    return temperature * jax.nn.logsumexp(log_q, axis=0, b=factors)


def ebkd(
    student: Float[Array, "*batch k"],
    teachers: Sequence[Float[Array, "..."]],
    *,
    temperature: Scalar = 4.0,
) -> Float32[Array, "*batch"]:
    """Divergences weighted by how certain each teacher is (EBKD).

        sum_i w_i * T^2 * KL(softmax(teacher_i / T) || softmax(student / T)) / n

    with the weights of `entropy_weights`. The 1/n is that of CA-MKD's code.

    Args:
      student: logits `[batch, classes]` or `[batch, height, width, classes]`.
      teachers: n >= 2 logits of the same shape; no gradient reaches them.
      temperature: softens all distributions, but not the weights.

    Returns:
      One float32 value per example, or per pixel.

    Raises:
      ValueError: fewer than two teachers, shapes or class counts differ, or
        `temperature` is not positive.

    Reference:
      Kwon et al., "Adaptive Knowledge Distillation Based on Entropy", ICASSP 2020.
    """
    teachers = [jax.lax.stop_gradient(t) for t in teachers]
    weights = entropy_weights(teachers)
    divergences = each_kd(student, teachers, temperature=temperature)
    return jnp.mean(weights * divergences, axis=0)


def camkd(
    student: Float[Array, "*batch k"],
    teachers: Sequence[Float[Array, "..."]],
    labels: Labels,
    *,
    temperature: Scalar = 4.0,
) -> Float32[Array, "*batch"]:
    """Divergences weighted by how right each teacher is (Zhang et al., 2022).

        sum_i w_i * T^2 * KL(softmax(teacher_i / T) || softmax(student / T)) / n

    with the weights of `confidence_weights`. The 1/n is that of the authors' code.

    Args:
      student: logits `[batch, classes]` or `[batch, height, width, classes]`.
      teachers: n >= 2 logits of the same shape; no gradient reaches them.
      labels: class indices or label vectors.
      temperature: softens all distributions, but not the weights.

    Returns:
      One float32 value per example, or per pixel.

    Raises:
      ValueError: fewer than two teachers, shapes or class counts differ, or
        `temperature` is not positive.

    Reference:
      Zhang, Chen, Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation",
      ICASSP 2022.
    """
    teachers = [jax.lax.stop_gradient(t) for t in teachers]
    weights = confidence_weights(teachers, labels)
    divergences = each_kd(student, teachers, temperature=temperature)
    return jnp.mean(weights * divergences, axis=0)


def weighted_hint(
    students: Sequence[Float[Array, "b ..."]],
    teachers: Sequence[Float[Array, "b ..."]],
    weights: Float[Array, "teachers b"],
) -> Float32[Array, "b"]:
    """Squared differences of features, weighted per teacher (Zhang et al., 2022).

        sum_i w_i * mean((student_i - teacher_i)^2) / n

    Args:
      students: the student's features as adapted to each of the n teachers.
      teachers: theirs, of the same shapes; no gradient reaches them.
      weights: `[teachers, batch]`; a gradient passes through them.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: shapes or numbers do not fit.
    """
    _check_teachers(teachers)
    shapes = [x.shape for x in students], [x.shape for x in teachers]
    if shapes[0] != shapes[1]:
        raise ValueError(f"student features {shapes[0]} and teachers {shapes[1]}")
    if weights.shape != (len(teachers), teachers[0].shape[0]):
        raise ValueError(
            f"weights have shape {weights.shape}; {len(teachers)} teachers and a batch "
            f"of {teachers[0].shape[0]} need {(len(teachers), teachers[0].shape[0])}"
        )
    differences = [
        s.astype(jnp.float32) - jax.lax.stop_gradient(t).astype(jnp.float32)
        for s, t in zip(students, teachers, strict=True)
    ]
    errors = jnp.stack([mean_per_example(jnp.square(d)) for d in differences])
    return jnp.mean(weights * errors, axis=0)


def confidence_weights(
    logits: Sequence[Float[Array, "*batch k"]], labels: Labels
) -> Float32[Array, "teachers *batch"]:
    """Weights by cross-entropy with the labels (Zhang et al., 2022).

        w_i = (1 - softmax_i(CE_i)) / (n - 1)

    For every example they sum to one over the teachers.

    Args:
      logits: one array per teacher; a gradient passes.
      labels: class indices or label vectors.

    Returns:
      float32 `[teachers, batch]`, or `[teachers, batch, height, width]`.

    Raises:
      ValueError: fewer than two teachers, or shapes differ.
    """
    errors = jnp.stack([cross_entropy(z, labels) for z in _stacked(logits, least=2)])
    return (1.0 - jax.nn.softmax(errors, axis=0)) / (len(logits) - 1)


def entropy_weights(
    logits: Sequence[Float[Array, "*batch k"]],
) -> Float32[Array, "teachers *batch"]:
    """Weights by the entropy H of each prediction: `1 - H_i / sum_j H_j`.

    They sum to n - 1 over the teachers. Where all are certain (no entropy at all) they
    are equal.

    Args:
      logits: one array per teacher.

    Returns:
      float32 `[teachers, batch]`, or `[teachers, batch, height, width]`.

    Raises:
      ValueError: fewer than two teachers, or shapes differ.
    """
    log_p = log_probabilities(_stacked(logits, least=2))
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    total = jnp.sum(entropy, axis=0, keepdims=True)
    share = jnp.where(
        total > 0, entropy / jnp.where(total > 0, total, 1.0), 1.0 / len(logits)
    )
    return 1.0 - share


def _normalized(shares: Sequence[float] | None, count: int) -> Float32[Array, "n"]:
    if shares is None:
        shares = [1.0] * count
    check_shares(shares)
    if len(shares) != count:
        raise ValueError(f"got {len(shares)} shares for {count} teachers")
    factors = np.asarray(shares, np.float64)
    return jnp.asarray(factors / factors.sum(), jnp.float32)


def check_shares(shares: Sequence[float]) -> None:
    """Checks that shares are finite, not negative, and not all zero.

    Raises:
      ValueError: they are.
    """
    if not all(np.isfinite(a) and a >= 0 for a in shares) or not sum(shares) > 0:
        raise ValueError(
            f"shares of the teachers must be finite and >= 0, and one above 0, got "
            f"{tuple(shares)}"
        )


def _check_teachers(teachers: Sequence[Float[Array, "..."]], least: int = 1) -> None:
    if len(teachers) < least:
        raise ValueError(
            f"the loss needs at least {least} teacher{'s' * (least > 1)}, got "
            f"{len(teachers)}"
        )


def _stacked(
    logits: Sequence[Float[Array, "..."]], least: int = 1
) -> Float32[Array, "teachers ..."]:
    """Finite logits of several teachers in one array."""
    _check_teachers(logits, least)
    shapes = [z.shape for z in logits]
    if len(set(shapes)) > 1:
        raise ValueError(f"the teachers' logits have shapes {shapes}; not equal")
    return jnp.stack([finite_logits(z) for z in logits])
