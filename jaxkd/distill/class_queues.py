"""Queues of embeddings, one per class, with static shapes.

A queue is a dict of two arrays: `entries` float32 `[classes, length, channels]`, unit
vectors, random ones at first; `next` int32 `[classes]`, where each class goes on. New
entries overwrite the oldest.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkd.numerics import l2_normalize

Queue = dict[str, jax.Array]


def make_queue(key: jax.Array, classes: int, length: int, channels: int) -> Queue:
    """A queue of random unit vectors for each class."""
    entries = jax.random.normal(key, (classes, length, channels), jnp.float32)
    return {"entries": l2_normalize(entries), "next": jnp.zeros(classes, jnp.int32)}


def enqueue(
    queue: Queue,
    items: Float[Array, "classes items channels"],
    present: Bool[Array, "classes items"],
) -> Queue:
    """Stores those items that are present, in order, class by class.

    Args:
      queue: of `length` entries per class, at least as many as items.
      items: unit vectors.
      present: which of them exist.

    Returns:
      The new queue.

    Raises:
      ValueError: there are more items than the queue is long.
    """
    classes, length, _ = queue["entries"].shape
    if items.shape[1] > length:
        raise ValueError(
            f"{items.shape[1]} new entries per class do not fit queues of {length}"
        )
    rank = jnp.cumsum(present, axis=1, dtype=jnp.int32) - 1
    place = (queue["next"][:, None] + rank) % length
    place = jnp.where(present, place, length)  # out of range: dropped
    row = jnp.arange(classes)[:, None]
    entries = queue["entries"].at[row, place].set(items, mode="drop")
    count = jnp.sum(present, axis=1, dtype=jnp.int32)
    return {"entries": entries, "next": (queue["next"] + count) % length}


def sample_queue(
    queue: Queue, key: jax.Array, per_class: int
) -> Float[Array, "entries channels"]:
    """Takes the entries at the same random places, without repetition, of all classes.

    Returns:
      `[classes * per_class, channels]`.
    """
    classes, length, channels = queue["entries"].shape
    places = jax.random.permutation(key, length)[:per_class]
    return queue["entries"][:, places].reshape(classes * per_class, channels)


def region_items(
    features: Float[Array, "b pixels channels"], labels: Int[Array, "b pixels"], n: int
) -> tuple[Float[Array, "n b channels"], Bool[Array, "n b"]]:
    """The mean feature of every class in every image, as a unit vector.

    Args:
      features: unit vectors.
      labels: class indices; others than `0..n - 1` belong to no class.
      n: classes.

    Returns:
      Items and whether the class occurs in the image, for `enqueue`.
    """
    members = jax.nn.one_hot(labels, n, dtype=jnp.float32)
    sums = jnp.einsum("bpn,bpc->nbc", members, features, precision="highest")
    # The sum has the direction of the mean.
    return l2_normalize(sums), jnp.any(members > 0, axis=1).T


def pixel_items(
    features: Float[Array, "b pixels channels"],
    labels: Int[Array, "b pixels"],
    key: jax.Array,
    n: int,
    most: int,
) -> tuple[Float[Array, "n items channels"], Bool[Array, "n items"]]:
    """Up to `most` random pixels of every class in every image.

    Args:
      features: unit vectors.
      labels: class indices; others than `0..n - 1` belong to no class.
      key: of the draw.
      n: classes.
      most: pixels per class and image.

    Returns:
      Items and which of them exist, for `enqueue`.
    """
    batch, pixels, channels = features.shape
    draw = jax.random.uniform(key, labels.shape)
    members = labels[:, None, :] == jnp.arange(n).reshape(1, n, 1)
    # Members have draws of at least 0, and the others are never picked before them.
    value, place = jax.lax.top_k(
        jnp.where(members, draw[:, None, :], -1.0), min(most, pixels)
    )
    items = jax.vmap(lambda image, index: image[index])(features, place)
    items = items.transpose(1, 0, 2, 3).reshape(n, -1, channels)
    return items, (value >= 0).transpose(1, 0, 2).reshape(n, -1)
