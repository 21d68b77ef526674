"""Work on a few images at a time, so that what it makes of them stays in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Numbers in float32 that one round may make: 8 MiB, a share of a common last-level
# cache. Half and double of it were slower by up to a tenth.
_BUDGET = 2**21


def map_images(
    function: Callable[[jax.Array], jax.Array], images: jax.Array, *, values: int
) -> jax.Array:
    """`function(images)`, a few images at a time.

    Args:
      function: maps a batch to a batch, image by image.
      images: `[batch, ...]`.
      values: how many numbers the function makes of one image.
    """
    count = len(images)
    size = _images_at_once(count, values)
    if size == count:
        return function(images)
    parts = _split(images, size)
    shape = jax.eval_shape(function, parts[0]).shape

    def body(i: jax.Array, results: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_index_in_dim(parts, i, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(results, function(part), i, 0)

    # To be overwritten. Zeros, as `jax.lax.map` takes, would be one constant for all
    # loops of a program, which XLA then copies for each.
    start = jnp.broadcast_to(images.reshape(-1)[0], (count // size, *shape))
    results = jax.lax.fori_loop(0, count // size, body, start)
    return results.reshape(count, *shape[1:])


def sum_images(
    function: Callable[[jax.Array, jax.Array], Any],
    images: jax.Array,
    others: jax.Array,
    *,
    values: int,
) -> Any:
    """`function(images, others)`, a few images at a time, summed.

    Args:
      function: makes sums over the images of a batch, a tree of arrays.
      images: `[batch, ...]`.
      others: `[batch, ...]`, what belongs to each image.
      values: how many numbers the function makes of one image.
    """
    count = len(images)
    size = _images_at_once(count, values)
    if size == count:
        return function(images, others)
    parts = _split(images, size), _split(others, size)

    def body(sums: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, function(*part)), None

    shapes = jax.eval_shape(function, *(x[0] for x in parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, parts)[0]


def _images_at_once(count: int, values: int) -> int:
    """The largest divisor of `count` whose images stay within the budget."""
    limit = max(1, min(count, _BUDGET // max(values, 1)))
    return next(size for size in range(limit, 0, -1) if count % size == 0)


def _split(images: jax.Array, size: int) -> jax.Array:
    return images.reshape(-1, size, *images.shape[1:])
