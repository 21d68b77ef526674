"""Losses of multi-level logit distillation: correlations of classes and of examples.

The instance level is `kd`. The class level compares which classes are predicted
together, the batch level which examples are predicted alike; both see the whole
(global) batch. `low_confidence` and `low_confidence_classes` choose where the method
learns from the weak view.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from jaxkd.losses.checks import (
    Scalar,
    check_logits,
    check_mask,
    check_positive,
    keep,
)
from jaxkd.losses.logits import log_probabilities


def class_correlation(
    student: Float[Array, "..."],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar = 4.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "b"]:
    """Difference of the class correlations (Jin et al., 2023).

        sum |P^T P - Q^T Q|^2 / K
        P = softmax(student / T),    Q = softmax(teacher / T)

    Args:
      student: logits `[batch, classes]`.
      teacher: logits of the same shape; no gradient reaches them.
      temperature: softens both distributions; the value does not carry its square.
      where: which classes (columns of the difference) count, bool `[classes]`.

    Returns:
      float32 `[batch]`: the value of the batch, repeated.

    Raises:
      ValueError: shapes differ, or `temperature` is not positive.

    Reference:
      Jin, Wang, Lin, "Multi-level Logit Distillation", CVPR 2023.
    """
    p, q = _probabilities(student, teacher, temperature)
    difference = _product("bk,bl->kl", q, q) - _product("bk,bl->kl", p, p)
    if where is not None:
        check_mask(where, student.shape[1:], of="the classes")
    per_class = keep(jnp.sum(jnp.square(difference), axis=0), where)
    return jnp.broadcast_to(jnp.sum(per_class) / p.shape[1], p.shape[:1])


def batch_correlation(
    student: Float[Array, "..."],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar = 4.0,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "b"]:
    """Difference of the correlations between examples (Jin et al., 2023).

        sum_j |(P P^T - Q Q^T)_ij|^2

    whose mean over the examples i is the published value.

    Args:
      student: logits `[batch, classes]`.
      teacher: logits of the same shape; no gradient reaches them.
      temperature: softens both distributions; the value does not carry its square.
      where: which examples i count; the others get 0 but still are a j.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: shapes differ, or `temperature` is not positive.

    Reference:
      Jin, Wang, Lin, "Multi-level Logit Distillation", CVPR 2023.
    """
    p, q = _probabilities(student, teacher, temperature)
    difference = _product("bk,ck->bc", q, q) - _product("bk,ck->bc", p, p)
    if where is not None:
        check_mask(where, student.shape[:1], of="the examples")
    return keep(jnp.sum(jnp.square(difference), axis=1), where)


def low_confidence(teacher: Float[Array, "b k"]) -> Bool[Array, "b"]:
    """The examples whose highest probability is at most the batch's median."""
    return _up_to_median(jnp.exp(jnp.max(log_probabilities(teacher), axis=-1)))


def low_confidence_classes(teacher: Float[Array, "b k"]) -> Bool[Array, "k"]:
    """The classes whose probability, summed over the batch, is at most the median."""
    return _up_to_median(jnp.sum(jnp.exp(log_probabilities(teacher)), axis=0))


def _up_to_median(values: Float32[Array, "n"]) -> Bool[Array, "n"]:
    # The median of an odd number of values is one of them. Computed twice, in two
    # fusions, it might not equal itself.
    values = jax.lax.optimization_barrier(jax.lax.stop_gradient(values))
    return values <= jnp.median(values)


def _probabilities(
    student: Float[Array, "..."], teacher: Float[Array, "..."], temperature: Scalar
) -> tuple[Float32[Array, "b k"], Float32[Array, "b k"]]:
    check_positive("temperature", temperature)
    check_logits(student, teacher)
    if student.ndim != 2:
        raise ValueError(
            f"correlations of a batch need logits [batch, classes], got shape "
            f"{student.shape}"
        )
    teacher = jax.lax.stop_gradient(teacher)
    return (
        jnp.exp(log_probabilities(student, temperature)),
        jnp.exp(log_probabilities(teacher, temperature)),
    )


def _product(
    subscripts: str, x: Float32[Array, "..."], y: Float32[Array, "..."]
) -> Float32[Array, "..."]:
    # The differences are small beside the products; a GPU would round to TF32.
    return jnp.einsum(subscripts, x, y, precision=jax.lax.Precision.HIGHEST)
