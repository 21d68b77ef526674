"""Losses between features of student and teacher that have one shape already.

Connectors (`jaxkd.layers.connectors`) bring the student's features to the teacher's
shape; they belong to the methods. The functions here take what connectors return.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from jaxkd.losses.checks import keep, mean_per_example, sum_per_example


def hint(
    student: Float[Array, "b *features"],
    teacher: Float[Array, "..."],
    *,
    where: Bool[Array, "b"] | None = None,
) -> Float32[Array, "b"]:
    """Mean squared difference of features (Romero et al., 2015, Eq. 3).

        mean (student - teacher)^2      over all axes but the first

    The paper sums and halves; published code averages, as here.

    Args:
      student: features of any rank, after the connector.
      teacher: features of the same shape; no gradient reaches them.
      where: which examples count; the others get 0.

    Returns:
      One float32 value per example.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(hint(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]])))
      [2.]

    Reference:
      Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.
    """
    return keep(mean_per_example(_squares(student, teacher)), where)


def reconstruction(
    generated: Float[Array, "b *features"],
    teacher: Float[Array, "..."],
    *,
    positions: Float[Array, "..."] | None = None,
    where: Bool[Array, "b"] | None = None,
) -> Float32[Array, "b"]:
    """Summed squared difference of features (Yang et al., 2022).

        sum positions * (generated - teacher)^2      over all axes but the first

    Args:
      generated: features of any rank.
      teacher: features of the same shape; no gradient reaches them.
      positions: factor per feature, broadcast against the features; e.g. 1 where the
        student's features were masked and 0 elsewhere. Of the rank of the features.
      where: which examples count; the others get 0.

    Returns:
      One float32 value per example.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> print(reconstruction(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 0.0]])))
      [5.]

    Reference:
      Yang et al., "Masked Generative Distillation", ECCV 2022.
    """
    squares = _squares(generated, teacher)
    if positions is not None:
        squares = squares * positions.astype(jnp.float32)
    return keep(sum_per_example(squares), where)


def vid(
    mean: Float[Array, "b *features c"],
    teacher: Float[Array, "..."],
    log_scale: Float[Array, "c"],
    *,
    epsilon: float = 1e-5,
    where: Bool[Array, "b"] | None = None,
) -> Float32[Array, "b"]:
    """Negative log-likelihood of the teacher's features (Ahn et al., 2019).

        mean 1/2 * ((mean - teacher)^2 / variance + log variance)
        variance = softplus(log_scale) + epsilon        per channel

    The constant `log(2 pi) / 2` is left out, so values may be negative.

    Args:
      mean: the student's prediction of the teacher's features.
      teacher: features of the same shape; no gradient reaches them.
      log_scale: `[channels]`.
      epsilon: lower bound of the variances.
      where: which examples count; the others get 0.

    Returns:
      One float32 value per example.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> unit = jnp.log(jnp.expm1(jnp.ones(1)))  # variance 1
      >>> print(vid(jnp.array([[1.0]]), jnp.array([[3.0]]), unit).round(3))
      [2.]

    Reference:
      Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR
      2019.
    """
    variance = jax.nn.softplus(log_scale.astype(jnp.float32)) + epsilon
    variance = variance.reshape((1,) * (mean.ndim - 1) + (-1,))
    values = 0.5 * (_squares(mean, teacher) / variance + jnp.log(variance))
    return keep(mean_per_example(values), where)


def softmax_regression(
    student: Float[Array, "b c"],
    teacher: Float[Array, "b k"],
    kernel: Float[Array, "c k"],
    bias: Float[Array, "k"],
    *,
    where: Bool[Array, "b"] | None = None,
) -> Float32[Array, "b"]:
    """How the teacher's classifier judges the student's feature (Yang et al., 2021).

        mean_k (student @ kernel + bias - teacher)_k^2

    Args:
      student: pooled features in the teacher's width.
      teacher: the teacher's logits; no gradient reaches them.
      kernel: of the teacher's last layer; no gradient reaches it.
      bias: of the same layer.
      where: which examples count; the others get 0.

    Returns:
      One float32 value per example.

    Example:
      >>> import jax.numpy as jnp
      >>> head = jnp.eye(2), jnp.zeros(2)
      >>> print(softmax_regression(jnp.ones((1, 2)), jnp.zeros((1, 2)), *head))
      [1.]

    Reference:
      Yang et al., "Knowledge Distillation via Softmax Regression Representation
      Learning", ICLR 2021.
    """
    return hint(classify(student, kernel, bias), teacher, where=where)


def classify(
    features: Float[Array, "b c"], kernel: Float[Array, "c k"], bias: Float[Array, "k"]
) -> Float32[Array, "b k"]:
    """Logits of a frozen linear layer: `features @ kernel + bias` in float32.

    No gradient reaches the layer.
    """
    kernel, bias = jax.lax.stop_gradient((kernel, bias))
    product = jnp.matmul(
        features.astype(jnp.float32),
        kernel.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return product + bias.astype(jnp.float32)[None]


def _squares(student: jax.Array, teacher: jax.Array) -> jax.Array:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student features have shape {student.shape} and teacher features "
            f"{teacher.shape}; a connector must make them equal"
        )
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    return jnp.square(student.astype(jnp.float32) - teacher)
