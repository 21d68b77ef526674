"""What the options common to all networks mean, and checks of what goes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def checked_dtype(dtype: Any) -> jnp.dtype:
    """The dtype meant by a dtype or its name.

    Raises:
      ValueError: no floating-point dtype.
    """
    try:
        value = jnp.dtype(dtype)
    except TypeError:
        value = None
    if value is None or not jnp.issubdtype(value, jnp.floating):
        raise ValueError(
            f"dtype must be a floating-point type such as 'bfloat16', got {dtype!r}"
        )
    return value


def checked_classes(num_classes: int) -> int:
    """The number of classes.

    Raises:
      ValueError: below 1.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be >= 1, got {num_classes}")
    return num_classes


def checked_rate(name: str, rate: float) -> float:
    """The rate of a dropout.

    Raises:
      ValueError: outside of 0 to 1, or 1 itself.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be >= 0 and < 1, got {rate}")
    return rate


def checked_factor(factor: float) -> float:
    """The factor of all widths.

    Raises:
      ValueError: a factor that is not above 0.
    """
    if not factor > 0:
        raise ValueError(f"width_factor must be > 0, got {factor}")
    return factor


def scaled(widths: Sequence[int], factor: float) -> tuple[int, ...]:
    """Widths times a factor, rounded to the nearest integer but never to zero.

    Raises:
      ValueError: a factor that is not above 0.

    >>> scaled((64, 128), 0.25)
    (16, 32)
    """
    checked_factor(factor)
    return tuple(max(1, round(width * factor)) for width in widths)


def check_images(images: jax.Array, *, network: str, multiple: int = 1) -> None:
    """Checks the shape of a batch of images.

    Raises:
      ValueError: not four axes, or a height or width that is no multiple of `multiple`.
    """
    if images.ndim != 4:
        raise ValueError(
            f"{network} needs images [batch, height, width, channels], "
            f"got shape {images.shape}"
        )
    height, width = images.shape[1:3]
    if height % multiple or width % multiple:
        raise ValueError(
            f"{network} needs a height and width divisible by {multiple}, "
            f"got {height}x{width}; crop or pad the images"
        )
