"""Cross-entropy with probabilities of a teacher, live or stored.

FKD trains on labels that a teacher gave once and that were stored, MEAL on the mean of
several teachers' probabilities. Neither softens the teacher here, nor multiplies by
the temperature squared.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from jaxkd.losses.blocks import rowwise
from jaxkd.losses.checks import Scalar, check_logits, check_mask, check_positive, keep
from jaxkd.losses.logits import log_probabilities


@rowwise
def soft_cross_entropy(
    student: Float[Array, "*batch k"],
    probabilities: Float[Array, "..."],
    *,
    temperature: Scalar = 1.0,
    where: Bool[Array, "*batch"] | None = None,
) -> Float32[Array, "*batch"]:
    """Cross-entropy of the student with given soft labels (Shen and Xing, 2022).

        -sum_k q_k log softmax(student / T)_k

    The temperature acts on the student alone and there is no factor T^2. A class of
    probability 0 adds nothing, also where the student's logit is -inf.

    Args:
      student: logits `[batch, classes]` or `[batch, height, width, classes]`.
      probabilities: soft labels of the same shape; no gradient reaches them.
      temperature: divides the student's logits.
      where: which examples or pixels count; the others get 0.

    Returns:
      One float32 value per example, or per pixel.

    Raises:
      ValueError: shapes differ, or `temperature` is not positive.

    Example:
      >>> student, labels = jnp.array([[1.0, 1.0]]), jnp.array([[0.75, 0.25]])
      >>> print(soft_cross_entropy(student, labels).round(4))
      [0.6931]

    Reference:
      Shen, Xing, "A Fast Knowledge Distillation Framework for Visual Recognition",
      ECCV 2022.
    """
    check_positive("temperature", temperature)
    check_logits(student, probabilities)
    if where is not None:
        check_mask(where, student.shape[:-1], of="these logits")
    q = jax.lax.stop_gradient(probabilities).astype(jnp.float32)
    return keep(-jnp.sum(q * log_probabilities(student, temperature), axis=-1), where)


def mean_probabilities(
    teachers: Sequence[Float[Array, "*batch k"]],
) -> Float32[Array, "*batch k"]:
    """The mean of several teachers' softmaxes, behind a stop-gradient.

    Args:
      teachers: logits of each teacher, all of one shape.

    Returns:
      float32 probabilities in the shape of the logits.

    Raises:
      ValueError: no teachers, or shapes differ.
    """
    return jnp.mean(jax.nn.softmax(_stack(teachers), axis=-1), axis=0)


def mean_logits(
    teachers: Sequence[Float[Array, "*batch k"]],
) -> Float32[Array, "*batch k"]:
    """The mean of several teachers' logits, behind a stop-gradient.

    Args:
      teachers: logits of each teacher, all of one shape.

    Returns:
      float32 logits.

    Raises:
      ValueError: no teachers, or shapes differ.
    """
    return jnp.mean(_stack(teachers), axis=0)


def _stack(teachers: Sequence[Float[Array, "..."]]) -> Float32[Array, "..."]:
    if not teachers:
        raise ValueError("a mean over teachers needs at least one teacher")
    shapes = [t.shape for t in teachers]
    if len(set(shapes)) > 1:
        raise ValueError(f"teachers' logits have shapes {shapes}; they must be equal")
    stacked = jnp.stack([t.astype(jnp.float32) for t in teachers])
    return jax.lax.stop_gradient(stacked)
