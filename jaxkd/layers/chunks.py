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
    size, rest = _images_at_once(count, values)
    if size == count:
        return function(images)
    if rest:
        most = map_images(function, images[:-rest], values=values)
        return jnp.concatenate([most, function(images[-rest:])])
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
    size, rest = _images_at_once(count, values)
    if size == count:
        return function(images, others)
    if rest:
        most = sum_images(function, images[:-rest], others[:-rest], values=values)
        return jax.tree.map(jnp.add, most, function(images[-rest:], others[-rest:]))
    parts = _split(images, size), _split(others, size)

    def body(sums: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, function(*part)), None

    shapes = jax.eval_shape(function, *(x[0] for x in parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, parts)[0]


def _images_at_once(count: int, values: int) -> tuple[int, int]:
    """How many images stay within the budget, and how many are left after all rounds.

    Fewer images, down to half of what the budget allows, if none are left then.
    """
    limit = max(1, min(count, _BUDGET // max(values, 1)))
    for size in range(limit, limit // 2, -1):
        if count % size == 0:
            return size, 0
    return limit, count % limit


def _split(images: jax.Array, size: int) -> jax.Array:
    return images.reshape(-1, size, *images.shape[1:])
