"""Several seeds in one program: every array gets a leading axis, and `vmap` runs them.

A run of one seed has no such axis. `Seeds` hides the difference from the loop.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


class Seeds:
    """The seeds of a run.

    Args:
      seeds: one, or several that are trained together.
    """

    def __init__(self, seeds: Sequence[int]):
        self.seeds = tuple(seeds)

    @property
    def several(self) -> bool:
        """Whether arrays have a leading axis of seeds."""
        return len(self.seeds) > 1

    def keys(self) -> jax.Array:
        """The random key of each run: `[]`, or `[seeds]`."""
        if not self.several:
            return jax.random.key(self.seeds[0])
        return jax.vmap(jax.random.key)(jnp.asarray(self.seeds, jnp.uint32))

    def lift(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function for all runs at once; all its arguments have the axis."""
        return jax.vmap(function) if self.several else function

    def lift_sharding(self, shardings: Any) -> Any:
        """The shardings of one run's arrays for those of all: seeds are not split."""
        if not self.several:
            return shardings
        return jax.tree.map(
            lambda s: NamedSharding(s.mesh, P(None, *s.spec)), shardings
        )

    def each(self, tree: Any) -> list[Any]:
        """The tree of each run."""
        if not self.several:
            return [tree]
        return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(len(self.seeds))]


def mean_of(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over the runs of each metric that all of them have."""
    if len(metrics) == 1:
        return dict(metrics[0])
    return {k: statistics.fmean(m[k] for m in metrics) for k in _shared(metrics)}


def spread_of(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The sample standard deviation of each metric over two runs or more."""
    return {k: statistics.stdev(m[k] for m in metrics) for k in _shared(metrics)}


def _shared(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    return [k for k in metrics[0] if all(k in m for m in metrics)]
