"""Splits by group: no patient, volume or file on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jaxkd.data.source import Record, Source


def split_by_group(
    groups: Sequence[str], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits records into train and test so that each group is on one side.

    The groups are sorted by name and permuted, so the split depends on the set of
    names and the seed, not on the order of the records.

    Args:
      groups: group of each record.
      fraction: share of the groups in the test split, in (0, 1); at least one group
        is on each side.
      seed: of the permutation.

    Returns:
      Record indices of train and test, int64, ascending.

    Raises:
      ValueError: `fraction` is not in (0, 1), or there are fewer than two groups.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the test fraction must be in (0, 1), got {fraction}")
    names = _shuffled(groups, seed)
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    return _sides(groups, names[:count])


def fold_by_group(
    groups: Sequence[str], folds: int, fold: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cross-validation by group: fold `fold` of `folds` is the test split.

    Args:
      groups: group of each record.
      folds: number of folds, at least 2.
      fold: which one, from 0.
      seed: of the permutation; all folds of one seed partition the groups.

    Returns:
      Record indices of train and test, int64, ascending.

    Raises:
      ValueError: impossible `folds` or `fold`, or fewer groups than folds.
    """
    names = _shuffled(groups, seed)
    if not 2 <= folds <= len(names):
        raise ValueError(
            f"folds must be between 2 and the {len(names)} groups, got {folds}"
        )
    if not 0 <= fold < folds:
        raise ValueError(f"fold must be in range({folds}), got {fold}")
    return _sides(groups, names[fold::folds])


class Subset:
    """Some records of a source, in the order given.

    Args:
      source: the source.
      indices: which of its records.
    """

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        self._source = source
        self._indices = np.asarray(indices, np.int64)
        self.info = source.info

    @property
    def groups(self) -> Sequence[str]:
        """The group of each record."""
        groups = self._source.groups
        return [groups[int(i)] for i in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._indices[index])]


def split_labelled(
    source: Source, fraction: float, *, seed: int
) -> tuple[Subset, Subset]:
    """Splits a source into records whose labels are used and records without.

    Groups stay together, as in every split.

    Args:
      source: the training records.
      fraction: share of the groups that are labelled, in (0, 1).
      seed: of the permutation of the groups.

    Returns:
      `(labelled, unlabelled)`.

    Raises:
      ValueError: `fraction` is not in (0, 1), or there are fewer than two groups.
    """
    unlabelled, labelled = split_by_group(source.groups, fraction, seed)
    return Subset(source, labelled), Subset(source, unlabelled)


def check_disjoint(train: Iterable[str], test: Iterable[str], name: str) -> None:
    """Checks that no group is in both splits.

    Raises:
      ValueError: some are; the message counts them and names the first.
    """
    shared = sorted(set(train) & set(test))
    if shared:
        raise ValueError(
            f"{name}: {len(shared)} group(s) are in both splits, the first is "
            f"{shared[0]!r}; move each group to one side"
        )


def _shuffled(groups: Sequence[str], seed: int) -> list[str]:
    names = sorted(set(groups))
    if len(names) < 2:
        raise ValueError(f"a split needs at least 2 groups, got {len(names)}")
    return [names[i] for i in np.random.default_rng(seed).permutation(len(names))]


def _sides(
    groups: Sequence[str], test_names: Iterable[str]
) -> tuple[np.ndarray, np.ndarray]:
    test_names = set(test_names)
    in_test = np.array([group in test_names for group in groups])
    return np.flatnonzero(~in_test), np.flatnonzero(in_test)
