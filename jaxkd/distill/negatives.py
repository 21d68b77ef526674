"""Draws of records of the same class, and of other classes, on the device.

The training records sorted by class make "all records of other classes" two runs of one
array, so that a draw among them is a draw among the first integers. Thousands of
distinct integers per example come from a keyed shuffle that is computed one position at
a time, without sorting or storing the records that were not drawn.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, Shaped, UInt32

Tables = dict[str, jax.Array]

# Rounds of the shuffle; fewer than six leave visible patterns in small ranges.
_ROUNDS = 8


def class_tables(labels: np.ndarray) -> Tables:
    """Sorts the training records by class.

    Args:
      labels: class of every record, int `[records]`.

    Returns:
      `classes` int32 `[records]`, the class of each record; `order` int32 `[records]`,
      the records sorted by class; `starts` int32 `[classes + 1]`, where in `order` each
      class begins.

    Raises:
      ValueError: there are fewer than two classes, so nothing to contrast.
    """
    if len(np.unique(labels)) < 2:
        raise ValueError(
            f"negatives are records of other classes; the {len(labels)} training "
            f"records have one class"
        )
    starts = np.concatenate([[0], np.cumsum(np.bincount(labels))])
    return {
        "classes": jnp.asarray(labels, jnp.int32),
        "order": jnp.asarray(np.argsort(labels, kind="stable"), jnp.int32),
        "starts": jnp.asarray(starts, jnp.int32),
    }


def draw_negatives(
    key: jax.Array, tables: Tables, records: Int[Array, "b"], *, count: int
) -> Int32[Array, "b count"]:
    """Draws records of other classes for each of `records`.

    Args:
      key: random key.
      tables: from `class_tables`.
      records: record numbers `[batch]`.
      count: how many to draw for each; distinct ones, or with replacement if there
        are fewer.
    """
    first, end = _range_of_class(tables, records)
    others = len(tables["order"]) - (end - first)
    distinct_key, repeated_key = jax.random.split(key)
    uniform = jax.random.uniform(repeated_key, (len(records), count))
    position = jnp.where(
        others >= count,
        draw_distinct(distinct_key, others, count=count),
        (uniform * others).astype(jnp.int32),
    )
    # What lies behind the own class moves up by its length.
    position += jnp.where(position >= first, end - first, 0)
    return tables["order"][position]


def draw_positives(
    key: jax.Array, tables: Tables, records: Int[Array, "b"]
) -> Int32[Array, "b"]:
    """Draws a record of the same class, maybe itself, for each of `records`."""
    first, end = _range_of_class(tables, records)
    uniform = jax.random.uniform(key, first.shape)
    position = first + (uniform * (end - first)).astype(jnp.int32)
    return tables["order"][position[:, 0]]


def draw_distinct(
    key: jax.Array, sizes: Int[Array, "b 1"], *, count: int
) -> Int32[Array, "b count"]:
    """Draws `count` distinct integers of `range(sizes[i])` for each `i`.

    They are the images of 0, 1, ... under a random bijection of the range: the rows and
    columns of a rectangle that just holds it shift each other in turns by hashed
    amounts, and what falls outside the range goes around again (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002). Rows with `sizes[i] < count` hold
    repetitions.

    Args:
      key: random key.
      sizes: int `[batch, 1]`, above 0.
      count: integers per row.
    """
    bits = jax.random.bits(key, (_ROUNDS, 2, len(sizes), 1), jnp.uint32)
    size = sizes.astype(jnp.uint32)
    width = jnp.sqrt(size.astype(jnp.float32)).astype(jnp.uint32) + 1
    height = size // width + 1

    def shift(
        cell: tuple[jax.Array, jax.Array], bits: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        column, row = cell
        column = _rotate(column, _hash(row ^ bits[0]), width)
        row = _rotate(row, _hash(column ^ bits[1]), height)
        return (column, row), None

    def shuffle(x: UInt32[Array, "b count"]) -> UInt32[Array, "b count"]:
        (column, row), _ = jax.lax.scan(shift, (x % width, x // width), bits)
        return row * width + column

    def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, outside = state
        x = jnp.where(outside, shuffle(x), x)
        return x, x >= size

    start = jnp.arange(count, dtype=jnp.uint32)[None, :] % size
    state = (start, jnp.ones(start.shape, bool))
    drawn, _ = jax.lax.while_loop(lambda state: jnp.any(state[1]), again, state)
    return drawn.astype(jnp.int32)


def _range_of_class(
    tables: Tables, records: Int[Array, "b"]
) -> tuple[Int32[Array, "b 1"], Int32[Array, "b 1"]]:
    own = tables["classes"][records][:, None]
    return tables["starts"][own], tables["starts"][own + 1]


def _rotate(
    x: UInt32[Array, "b n"], by: UInt32[Array, "b n"], size: UInt32[Array, "b 1"]
) -> UInt32[Array, "b n"]:
    moved = x + by % size
    return jnp.where(moved >= size, moved - size, moved)


def _hash(x: Shaped[Array, "b n"]) -> UInt32[Array, "b n"]:
    """The mixing step of MurmurHash3 (Appleby, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
