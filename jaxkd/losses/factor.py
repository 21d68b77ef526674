"""Factor transfer: compact codes of features instead of features."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxkd.losses.attention import attention_map
from jaxkd.losses.checks import mean_per_example
from jaxkd.losses.maps import pool_to_smallest
from jaxkd.numerics import l2_normalize

Variant = Literal["repdistiller", "paper"]


def ft(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "..."],
    *,
    p1: int = 2,
    p2: int = 1,
    variant: Variant = "repdistiller",
) -> Float32[Array, "b"]:
    """Distance of a student's and a teacher's factor (Kim et al., 2018).

        mean of |F(student) - F(teacher)|^p2

        variant="repdistiller":  F = attention map of power p1, over pixels
        variant="paper":         F = x / max(||x||, 1e-12), over pixels and channels

    The larger factor is averaged down to the size of the smaller one first.

    Args:
      student: factor of the student: what its translator returns.
      teacher: factor of the teacher: what its paraphraser's encoder returns. No
        gradient reaches it.
      p1: power of `attention_map`; the paper's variant has none.
      p2: power of the difference.
      variant: what is compared, see above.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: an array is not a map, batches differ, an option is impossible, or
        the paper's variant is given factors of different widths.

    Example:
      >>> student = jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1)
      >>> teacher = jnp.array([0.0, 2.0]).reshape(1, 1, 2, 1)
      >>> print(ft(student, teacher))
      [1.]

    Reference:
      Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor
      Transfer", NeurIPS 2018.
    """
    if p2 < 1:
        raise ValueError(f"p2 must be an integer above 0, got {p2}")
    student, teacher = pool_to_smallest(
        student, jax.lax.stop_gradient(teacher), what="factors"
    )
    if variant == "repdistiller":
        difference = attention_map(student, exponent=p1) - attention_map(
            teacher, exponent=p1
        )
    elif variant == "paper":
        if student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                f"the student's factor has {student.shape[-1]} channels and the "
                f"teacher's {teacher.shape[-1]}; give the translator the same width"
            )
        axes = (1, 2, 3)
        difference = l2_normalize(student, axis=axes) - l2_normalize(teacher, axis=axes)
    else:
        raise ValueError(f"variant must be 'repdistiller' or 'paper', got {variant!r}")
    # Unlike jnp.abs, whose gradient at zero is one, this has the gradient zero there.
    distance = difference * jnp.sign(difference)
    return mean_per_example(distance**p2)
