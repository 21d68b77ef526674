"""Losses on correlations of predictions instead of their values: DIST.

Two rows that are a positive multiple and a constant apart correlate fully, so the
student keeps the teacher's order and relative distances and is free in the rest.
`dist_inter` correlates the classes of one example, `dist_intra` the examples of one
class, over the whole (global) batch. In dense logits every pixel is an example.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxkd.losses.blocks import rowwise
from jaxkd.losses.checks import Scalar, check_logits, check_positive
from jaxkd.losses.logits import log_probabilities


def dist(
    student: Float[Array, "*batch k"],
    teacher: Float[Array, "..."],
    *,
    beta: Scalar = 1.0,
    gamma: Scalar = 1.0,
    temperature: Scalar = 1.0,
) -> Float32[Array, "*batch"]:
    """Inter-class and intra-class relations (Huang et al., 2022).

        beta * dist_inter + gamma * dist_intra

    Args:
      student: logits `[batch, classes]` or `[batch, height, width, classes]`.
      teacher: logits of the same shape; no gradient reaches them.
      beta: factor of the inter-class part.
      gamma: factor of the intra-class part.
      temperature: softens both distributions; both parts carry its square.

    Returns:
      One float32 value per example, or per pixel.

    Raises:
      ValueError: shapes or class counts differ, or `temperature` is not positive.

    Example:
      >>> teacher = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> print(dist(-teacher, teacher).round(3))
      [4. 4.]

    Reference:
      Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022.
    """
    return beta * dist_inter(student, teacher, temperature=temperature) + (
        gamma * dist_intra(student, teacher, temperature=temperature)
    )


@rowwise
def dist_inter(
    student: Float[Array, "*batch k"],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar = 1.0,
) -> Float32[Array, "*batch"]:
    """Correlation over the classes of every example (Huang et al., 2022).

        T^2 * (1 - r(p_i, q_i)),    r = Pearson's coefficient
        p = softmax(student / T),   q = softmax(teacher / T)

    A uniform distribution has no correlation: the value is T^2 and gets no gradient.
    Arguments, result and errors are those of `dist`.
    """
    p, q = _probabilities(student, teacher, temperature)
    return temperature**2 * (1.0 - _pearson(p, q, axis=-1))


def dist_intra(
    student: Float[Array, "*batch k"],
    teacher: Float[Array, "..."],
    *,
    temperature: Scalar = 1.0,
) -> Float32[Array, "*batch"]:
    """Correlation over the examples of every class (Huang et al., 2022).

        T^2 * mean_k (1 - r(p_{:k}, q_{:k}))

    The value of the batch, repeated for each example. A batch of one has no
    correlation: the value is T^2 and gets no gradient. Arguments, result and errors
    are those of `dist`.
    """
    p, q = (
        x.reshape(-1, x.shape[-1])
        for x in _probabilities(student, teacher, temperature)
    )
    value = temperature**2 * (1.0 - jnp.mean(_pearson(p, q, axis=0)))
    return jnp.broadcast_to(value, student.shape[:-1])


def _probabilities(
    student: Float[Array, "..."], teacher: Float[Array, "..."], temperature: Scalar
) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    check_positive("temperature", temperature)
    check_logits(student, teacher)
    teacher = jax.lax.stop_gradient(teacher)
    return (
        jnp.exp(log_probabilities(student, temperature)),
        jnp.exp(log_probabilities(teacher, temperature)),
    )


def _pearson(
    x: Float32[Array, "..."], y: Float32[Array, "..."], axis: int
) -> Float32[Array, "..."]:
    """Pearson's coefficient, 0 with no gradient where a side is constant."""
    x = x - jnp.mean(x, axis, keepdims=True)
    y = y - jnp.mean(y, axis, keepdims=True)
    x_square, y_square = jnp.sum(x * x, axis), jnp.sum(y * y, axis)
    varies = (x_square > 0) & (y_square > 0)
    norms = jnp.sqrt(jnp.where(varies, x_square, 1.0)) * jnp.sqrt(
        jnp.where(varies, y_square, 1.0)
    )
    # The constant is the published code's.
    return jnp.where(varies, jnp.sum(x * y, axis) / (norms + 1e-8), 0.0)
