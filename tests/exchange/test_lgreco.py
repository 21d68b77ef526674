"""The choice of ranks, ratios and bits: against all choices, and at its edges."""

import itertools

import numpy as np
import pytest

from jaxkd.exchange import choose, lgreco_ranks
from jaxkd.exchange.lgreco import (
    bit_tables,
    candidate_ranks,
    discretise,
    rank_tables,
    ratio_tables,
)


def matrices(seed=0, shapes=((12, 20), (30, 16), (9, 25))):
    """Matrices whose singular values fall at different rates."""
    rng = np.random.default_rng(seed)
    found = []
    for i, shape in enumerate(shapes):
        u, s, v = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
        found.append((u * s * 0.5 ** (np.arange(len(s)) * i / 2)) @ v)
    return found


@pytest.mark.parametrize("alpha", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_finds_the_best_of_all_choices(alpha, seed):
    errors, sizes = rank_tables(matrices(seed), [2, 3, 4, 5, 6])
    budget = alpha * errors[:, 2].sum()
    filled = discretise(errors, budget)
    every = [
        sizes[range(3), picks].sum()
        for picks in itertools.product(range(5), repeat=3)
        if filled[range(3), picks].sum() <= 9_999
    ]
    chosen = choose(errors, sizes, base=2, alpha=alpha)
    assert chosen is not None
    assert filled[range(3), chosen].sum() <= 9_999
    assert sizes[range(3), chosen].sum() == min(every)
    assert errors[range(3), chosen].sum() <= budget


def test_the_buckets_are_filled_to_9999_and_no_more():
    # Two layers whose coarse candidates would fill 10000 together.
    errors = np.array([[0.5, 0.4], [0.5, 0.5]])
    sizes = np.array([[1.0, 2.0], [1.0, 2.0]])
    assert discretise(errors, 1.0)[:, 0].sum() == 10_000
    assert choose(errors, sizes, base=0) == [1, 0]
    errors[0, 0] = 0.4999
    # The budget is of the base candidate; here one that the first layer never takes.
    errors, sizes = np.c_[errors, [0.5, 0.5]], np.c_[sizes, [9.0, 9.0]]
    assert choose(errors, sizes, base=2) == [0, 0]


def test_one_layer_takes_the_smallest_that_is_good_enough():
    errors, sizes = np.array([[3.0, 2.0, 1.0]]), np.array([[1.0, 2.0, 3.0]])
    # The budget equals the error of the base, which fills all buckets but may not.
    assert choose(errors, sizes, base=1) == [2]
    assert choose(errors, sizes, base=1, alpha=1.01) == [1]


def test_without_error_or_without_a_choice_nothing_is_chosen():
    sizes = np.ones((2, 2))
    assert choose(np.zeros((2, 2)), sizes, base=0) is None
    assert choose(np.full((2, 2), np.inf), sizes, base=0) is None
    assert choose(np.ones((2, 2)), sizes, base=0, alpha=0.5) is None


def test_a_layer_that_is_not_finite_does_not_spoil_the_others():
    errors = np.array([[1.0, 0.5], [np.nan, np.nan]])
    filled = discretise(errors, 1.0)
    np.testing.assert_array_equal(filled[1], [10_000, 10_000])
    broken = {"a": np.ones((4, 5)), "b": np.full((4, 5), np.nan)}
    assert lgreco_ranks(broken, base_rank=2) == {"a": 2, "b": 2}


def test_ranks_never_cost_more_than_the_uniform_rank():
    gradients = dict(zip("abc", matrices(), strict=True))
    ranks = lgreco_ranks(gradients, base_rank=4, alpha=1.05)
    assert set(ranks) == set(gradients)
    size = sum(r * sum(gradients[p].shape) for p, r in ranks.items())
    assert size <= 4 * sum(sum(g.shape) for g in gradients.values())
    assert all(2 <= r <= 8 for r in ranks.values())
    # The layer whose singular values fall slowest gets the largest rank.
    assert ranks["a"] > ranks["c"]


def test_earlier_ranks_stay_where_nothing_is_good_enough():
    gradients = {"a": np.zeros((6, 7)), "b": np.zeros((2, 9))}
    assert lgreco_ranks(gradients, base_rank=4) == {"a": 4, "b": 2}
    kept = lgreco_ranks(gradients, base_rank=4, previous={"a": 3, "b": 1})
    assert kept == {"a": 3, "b": 1}


def test_tables_of_ranks():
    u, v = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0], np.eye(5, 6)
    matrix = u @ np.diag([5.0, 4, 3, 2, 1]) @ v
    errors, sizes = rank_tables([matrix], [3, 5, 6])
    np.testing.assert_allclose(errors, [[np.sqrt(5), 0, 0]], atol=1e-9)
    # A rank above 5 costs one more, so that the true rank wins.
    np.testing.assert_array_equal(sizes, [[33, 55, 56]])
    assert candidate_ranks(4) == [2, 3, 4, 5, 6, 7, 8]
    assert candidate_ranks(5) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert candidate_ranks(1) == [1, 2]


def test_tables_of_ratios_and_bits():
    gradient = np.array([[3.0, -4.0], [0.0, 1.0]])
    errors, sizes = ratio_tables([gradient], [0.25, 0.5, 1.0])
    np.testing.assert_allclose(errors, [[np.sqrt(10), 1, 0]])
    np.testing.assert_array_equal(sizes, [[2, 4, 4]])
    errors, sizes = bit_tables([gradient, 0 * gradient], [2, 8])
    # In steps of 4 the 3 becomes 4 and the 1 becomes 0.
    np.testing.assert_allclose(errors[0, 0], np.sqrt(2))
    np.testing.assert_array_equal(errors[1], [0, 0])
    np.testing.assert_array_equal(sizes, [[8, 32], [8, 32]])
    chosen = choose(*ratio_tables(matrices(), [0.05, 0.1, 0.2, 0.4]), base=1)
    assert chosen is not None and len(chosen) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": 5}, "base must be a candidate's index, got 5"),
        ({"base": 0, "alpha": 0.0}, "alpha must be > 0 and finite, got 0.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        choose(np.ones((2, 3)), np.ones((2, 3)), **options)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="errors and sizes must be"):
        choose(np.ones((2, 3)), np.ones((2, 4)), base=0)
    with pytest.raises(ValueError, match="gradients must be matrices"):
        lgreco_ranks({"a": np.ones((2, 3, 4))})
    with pytest.raises(ValueError, match="base_rank must be >= 1"):
        lgreco_ranks({}, base_rank=0)
