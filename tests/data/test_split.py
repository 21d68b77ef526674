"""Splits by group."""

import numpy as np
import pytest

from jaxkd.data import check_disjoint, fold_by_group, split_by_group

GROUPS = [f"patient {i % 10}" for i in range(35)]


def names(indices):
    return {GROUPS[i] for i in indices}


def test_no_group_is_on_both_sides_and_none_is_lost():
    for seed in range(20):
        train, test = split_by_group(GROUPS, 0.3, seed)
        assert not names(train) & names(test)
        assert len(names(test)) == 3
        np.testing.assert_array_equal(
            np.sort(np.concatenate([train, test])), np.arange(35)
        )
        assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()


def test_the_split_depends_on_the_names_and_the_seed_not_on_the_order():
    train, _ = split_by_group(GROUPS, 0.3, 4)
    backwards, _ = split_by_group(GROUPS[::-1], 0.3, 4)
    assert names(train) == {GROUPS[::-1][i] for i in backwards}
    others = [frozenset(names(split_by_group(GROUPS, 0.3, s)[1])) for s in range(9)]
    assert len(set(others)) > 5


@pytest.mark.parametrize(("fraction", "count"), [(0.001, 1), (0.999, 9), (0.25, 2)])
def test_both_sides_have_at_least_one_group(fraction, count):
    _, test = split_by_group(GROUPS, fraction, 0)
    assert len(names(test)) == count


def test_folds_partition_the_groups():
    tested = [fold_by_group(GROUPS, 4, fold, 2)[1] for fold in range(4)]
    assert sum(len(names(test)) for test in tested) == 10
    assert set().union(*map(names, tested)) == set(GROUPS)
    for fold, test in enumerate(tested):
        train, _ = fold_by_group(GROUPS, 4, fold, 2)
        assert names(train) == set(GROUPS) - names(test)


def test_overlap_is_counted_and_named():
    check_disjoint(["a", "b"], ["c"], "set")
    with pytest.raises(ValueError, match="set: 2 group.* both splits, .* 'b'"):
        check_disjoint(["a", "b", "c"], ["c", "b", "d"], "set")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_by_group(GROUPS, 0.0, 0), "in \\(0, 1\\), got 0.0"),
        (lambda: split_by_group(["a", "a"], 0.5, 0), "at least 2 groups, got 1"),
        (lambda: fold_by_group(GROUPS, 1, 0, 0), "between 2 and the 10 groups"),
        (lambda: fold_by_group(GROUPS, 11, 0, 0), "between 2 and the 10 groups"),
        (lambda: fold_by_group(GROUPS, 5, 5, 0), "range\\(5\\), got 5"),
    ],
)
def test_impossible_splits_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
