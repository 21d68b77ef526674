"""Squared error without an average: what a replaced head of a network learns from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from jaxkd.losses.checks import check_mask, keep, sum_per_example


def squared_error_sum(
    student: Float[Array, "b ..."],
    teacher: Float[Array, "..."],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float32[Array, "b"]:
    """Squared distance between features of each example (GHND; Matsubara et al., 2022).

        sum_i (student_i - teacher_i)^2

    over all positions and channels of an example. The published loss sums over the
    batch as well: it is the mean of these values times the batch size.

    Args:
      student: features `[batch, ...]`.
      teacher: features of the same shape. No gradient reaches them.
      where: the examples that count; the others have the value 0.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: shapes differ, or `where` is not `[batch]`.

    >>> squared_error_sum(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])).tolist()
    [5.0]

    Reference:
      Matsubara and Levorato, "Neural Compression and Filtering for Edge-assisted
      Real-time Object Detection in Challenged Networks", ICPR 2020.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student features have shape {student.shape} and teacher features "
            f"{teacher.shape}; they must be equal"
        )
    if where is not None:
        check_mask(where, student.shape[:1], of="squared errors")
    target = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    difference = student.astype(jnp.float32) - target
    return keep(sum_per_example(jnp.square(difference)), where)
