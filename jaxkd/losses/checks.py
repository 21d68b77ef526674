"""Border checks and masks that the losses share.

Everything here looks at static shapes and Python numbers before tracing, so a mistake
ends in one line and costs nothing under jit. Masks are boolean `where=` arguments:
what they leave out has the value zero and gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Shaped

Scalar = float | int | jax.Array
Schedule = Callable[..., object]

# Stands for -inf where a class takes no part: exp() of it is exactly zero, and its
# difference with itself is zero where that of -inf is NaN.
_EXCLUDED = -1e30


def check_positive(name: str, value: Scalar | Schedule) -> None:
    """Rejects a Python number that is not above zero; traced values and schedules pass.

    Raises:
      ValueError: `value` is zero, negative or NaN.
    """
    if isinstance(value, int | float) and not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")


def check_fraction(name: str, value: Scalar | Schedule) -> None:
    """Rejects a Python number outside `[0, 1]`; traced values and schedules pass.

    Raises:
      ValueError: `value` is outside.
    """
    if isinstance(value, int | float) and not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Rejects a word that is none of those known.

    Raises:
      ValueError: it is another one.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_logits(student: Shaped[Array, "..."], teacher: Shaped[Array, "..."]) -> None:
    """Checks that student and teacher logits have one shape.

    Raises:
      ValueError: they differ; classes are named first, as the usual mistake.
    """
    if student.ndim < 2:
        raise ValueError(
            f"logits must be [batch, classes] or [batch, height, width, classes], "
            f"got shape {student.shape}"
        )
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"teacher logits have {teacher.shape[-1]} classes and student logits "
            f"{student.shape[-1]}; train both on the same classes or select the "
            f"common ones"
        )
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits have shape {student.shape} and teacher logits "
            f"{teacher.shape}; resize one of them first"
        )


def check_maps(*maps: Shaped[Array, "..."], what: str) -> None:
    """Checks that all arrays are maps `[batch, height, width, channels]` of one batch.

    Raises:
      ValueError: an array has another rank, or the batch sizes differ.
    """
    if not maps:
        raise ValueError(f"{what} need at least one map")
    for x in maps:
        if x.ndim != 4:
            raise ValueError(
                f"{what} must be [batch, height, width, channels], got shape {x.shape}"
            )
    batches = [x.shape[0] for x in maps]
    if len(set(batches)) > 1:
        raise ValueError(f"{what} have batch sizes {batches}; they must be equal")


def check_mask(where: Shaped[Array, "..."], shape: tuple[int, ...], *, of: str) -> None:
    """Checks that a mask has the shape `shape`.

    Raises:
      ValueError: it has another one.
    """
    if where.shape != shape:
        raise ValueError(f"where has shape {where.shape}; {of} need {shape}")


def keep(
    values: Float32[Array, "*shape"], where: Bool[Array, "*shape"] | None
) -> Float32[Array, "*shape"]:
    """Zeroes the values that `where` leaves out, and their gradients."""
    return values if where is None else jnp.where(where, values, 0.0)


def without_classes(
    logits: Float[Array, "..."], where: Bool[Array, "..."] | None
) -> Float[Array, "..."]:
    """Takes classes out of a softmax by a large finite negative logit."""
    return logits if where is None else jnp.where(where, logits, _EXCLUDED)


def split_mask(
    where: Bool[Array, "..."] | None, shape: tuple[int, ...]
) -> tuple[Bool[Array, "..."] | None, Bool[Array, "..."] | None]:
    """Sorts a mask by its shape into (examples or pixels, classes).

    Args:
      where: mask of shape `shape[:-1]` (examples or pixels) or `shape` (classes).
      shape: shape of the logits.

    Raises:
      ValueError: the mask has neither shape.
    """
    if where is None:
        return None, None
    if where.shape == shape[:-1]:
        return where, None
    if where.shape == shape:
        return None, where
    raise ValueError(
        f"where has shape {where.shape}; logits of shape {shape} need {shape[:-1]} to "
        f"choose examples or pixels, or {shape} to choose classes"
    )


def sum_per_example(values: Float[Array, "b ..."]) -> Float[Array, "b"]:
    """Sums over every axis but the first."""
    return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def mean_per_example(values: Float[Array, "b ..."]) -> Float[Array, "b"]:
    """Averages over every axis but the first."""
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))
