import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxkd.distill.negatives import (
    class_tables,
    draw_distinct,
    draw_negatives,
    draw_positives,
)

LABELS = np.array([2, 0, 2, 1, 0, 2, 2, 4, 0, 2], np.int32)


def distinct(sizes, count, seed=0):
    sizes = jnp.asarray(sizes, jnp.int32)[:, None]
    draw = jax.jit(draw_distinct, static_argnames="count")
    return np.asarray(draw(jax.random.key(seed), sizes, count=count))


def negatives(records, count, seed=0):
    draw = jax.jit(draw_negatives, static_argnames="count")
    tables = class_tables(LABELS)
    return np.asarray(
        draw(jax.random.key(seed), tables, jnp.asarray(records), count=count)
    )


def test_tables_hold_the_records_sorted_by_class():
    tables = {k: np.asarray(v) for k, v in class_tables(LABELS).items()}
    np.testing.assert_array_equal(tables["classes"], LABELS)
    assert tables["order"].tolist() == [1, 4, 8, 3, 0, 2, 5, 6, 9, 7]
    # Nobody is of class 3.
    assert tables["starts"].tolist() == [0, 3, 4, 9, 9, 10]


def test_one_class_has_nothing_to_contrast():
    with pytest.raises(ValueError, match="the 6 training records have one class"):
        class_tables(np.full(6, 3, np.int32))


@pytest.mark.parametrize(("label", "others"), [(0, 7), (2, 5), (4, 9)])
def test_negatives_are_all_records_of_other_classes_and_each_once(label, others):
    drawn = negatives(np.flatnonzero(LABELS == label), others)
    for row in drawn:
        assert sorted(row) == np.flatnonzero(LABELS != label).tolist()


def test_negatives_repeat_only_where_others_are_too_few():
    # Class 2 has five others, class 0 seven.
    drawn = negatives([0, 1, 5], 6)
    assert len(set(drawn[1])) == 6
    for row, record in zip(drawn, (0, 1, 5), strict=True):
        assert np.all(LABELS[row] != LABELS[record])


def test_repeated_negatives_are_uniform():
    drawn = negatives(np.zeros(1000, np.int32), 6)
    counts = np.bincount(drawn.ravel(), minlength=len(LABELS))
    assert scipy.stats.chisquare(counts[LABELS != 2]).pvalue > 0.01
    assert np.all(counts[LABELS == 2] == 0)


def test_positives_are_of_the_same_class_and_uniform():
    records = jnp.asarray(np.tile(np.arange(len(LABELS)), 500))
    drawn = np.asarray(draw_positives(jax.random.key(0), class_tables(LABELS), records))
    np.testing.assert_array_equal(LABELS[drawn], LABELS[np.asarray(records)])
    counts = np.bincount(drawn[LABELS[drawn] == 2], minlength=len(LABELS))
    assert scipy.stats.chisquare(counts[LABELS == 2]).pvalue > 0.01


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 99, 1000])
def test_distinct_integers_of_a_whole_range_are_a_permutation(size):
    drawn = distinct([size] * 4, size)
    np.testing.assert_array_equal(np.sort(drawn), np.tile(np.arange(size), (4, 1)))


def test_distinct_integers_of_a_large_range():
    """A negative per example and slot as in CIFAR-100."""
    drawn = distinct([49500, 40000], 16384)
    assert drawn.min() >= 0
    for row, size in zip(drawn, (49500, 40000), strict=True):
        assert len(np.unique(row)) == 16384
        assert row.max() < size
        counts, _ = np.histogram(row, bins=20, range=(0, size))
        assert scipy.stats.chisquare(counts).pvalue > 0.01
    assert not np.array_equal(*drawn % 1000)


@pytest.mark.parametrize(("size", "count"), [(4, 3), (5, 2), (7, 3)])
def test_every_order_is_equally_likely(size, count):
    drawn = distinct([size] * 20000, count)
    seen = collections.Counter(map(tuple, drawn.tolist()))
    counts = [seen[order] for order in itertools.permutations(range(size), count)]
    assert sum(counts) == len(drawn)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_draws_follow_the_key():
    np.testing.assert_array_equal(distinct([30], 9), distinct([30], 9))
    assert not np.array_equal(distinct([30], 9), distinct([30], 9, seed=1))
