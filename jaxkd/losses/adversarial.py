"""The losses of MEAL: similarity of outputs, and a discriminator between them.

A discriminator gives two values per row, the first of which should be large for the
student and the second for the teachers. `discriminator_loss` is one loss for both
players; whether the student is pulled along with the discriminator (as published) or
against it (`reverse_gradient`) is decided before the discriminator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32

from jaxkd.losses.checks import check_choice, check_logits, mean_per_example
from jaxkd.losses.soft_labels import soft_cross_entropy

Layer = tuple[Float[Array, "_ _"], Float[Array, "_"]]


def discriminate(
    x: Float[Array, "b c"], layers: Sequence[Layer]
) -> Float32[Array, "b 2"]:
    """Runs MEAL's discriminator: dense layers with a ReLU after each, the last too.

    Args:
      x: outputs of a network, `[batch, channels]`.
      layers: `(kernel, bias)` of each layer; the last has two outputs.

    Returns:
      float32 `[batch, 2]`, nothing below 0.

    Raises:
      ValueError: no layers, or the last does not have two outputs.
    """
    if not layers or layers[-1][0].shape[-1] != 2:
        raise ValueError(
            f"a discriminator ends in two outputs, got kernels of shapes "
            f"{[kernel.shape for kernel, _ in layers]}"
        )
    x = x.astype(jnp.float32)
    for kernel, bias in layers:
        x = jax.nn.relu(x @ kernel + bias[None])
    return x


def discriminator_loss(
    student: Float[Array, "b d"], teacher: Float[Array, "..."]
) -> Float32[Array, "b"]:
    """Sigmoid cross-entropy of a discriminator of two networks (Shen et al., 2019).

        mean over the 4 entries of BCE([d(student), d(teacher)], [(1, 0), (0, 1)])

    The ReLU after MEAL's discriminator makes its outputs non-negative: the loss starts
    near log 2 and stays there, without gradient, if all of them die.

    Args:
      student: the discriminator's outputs for the student, `[batch, 2]`.
      teacher: those for the teacher, `[batch, 2]`. Both carry gradients, because both
        train the discriminator.

    Returns:
      float32 `[batch]`; the mean is that over all `4 batch` entries.

    Raises:
      ValueError: shapes differ, or there are not two outputs.

    Example:
      >>> zeros = jnp.zeros((1, 2))
      >>> print(discriminator_loss(zeros, zeros).round(4))
      [0.6931]

    Reference:
      Shen, He, Xue, "MEAL: Multi-Model Ensemble via Adversarial Learning", AAAI 2019.
    """
    if student.shape != teacher.shape or student.shape[-1] != 2:
        raise ValueError(
            f"discriminator outputs have shapes {student.shape} and {teacher.shape}; "
            f"both must be (batch, 2)"
        )
    outputs = jnp.concatenate([student, teacher], axis=-1).astype(jnp.float32)
    targets = jnp.broadcast_to(jnp.array([[1.0, 0.0, 0.0, 1.0]]), outputs.shape)
    entries = optax.losses.sigmoid_binary_cross_entropy(outputs, targets)
    return jnp.mean(entries, axis=-1)


def meal_similarity(
    student: Float[Array, "b c"],
    teacher: Float[Array, "..."],
    *,
    kind: Literal["ce", "l1", "l2", "l1_soft", "l2_soft"] = "ce",
) -> Float32[Array, "b"]:
    """How MEAL compares the pooled outputs of two networks (Shen et al., 2019).

    Args:
      student: outputs `[batch, channels]`.
      teacher: outputs of the same shape; no gradient reaches them.
      kind: `"ce"` for `-sum softmax(teacher) log softmax(student)`; `"l1"` and `"l2"`
        for mean absolute and squared differences; `"l1_soft"` and `"l2_soft"` for
        those of the softmaxes.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: shapes differ, or no such kind.

    Reference:
      Shen, He, Xue, "MEAL: Multi-Model Ensemble via Adversarial Learning", AAAI 2019.
    """
    check_logits(student, teacher)
    check_choice("kind", kind, ("ce", "l1", "l2", "l1_soft", "l2_soft"))
    student = student.astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    if kind == "ce":
        return soft_cross_entropy(student, jax.nn.softmax(teacher, axis=-1))
    if kind.endswith("_soft"):
        student = jax.nn.softmax(student, axis=-1)
        teacher = jax.nn.softmax(teacher, axis=-1)
    difference = student - teacher
    # Where both are equal, this leaves the gradient 0; that of `jnp.abs` is 1 there.
    factor = jnp.sign(difference) if kind.startswith("l1") else difference
    return mean_per_example(difference * factor)


def reverse_gradient(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` itself, with the gradient that comes back negated (Ganin et al., 2016).

    Reference:
      Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 2016.
    """
    return 2 * jax.lax.stop_gradient(x) - x
