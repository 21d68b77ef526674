"""From one step to programs of several: what the host sends to the devices at once."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxkd.training.compilation import ProgramReport, compile_ahead
from jaxkd.training.feeds import Feed
from jaxkd.training.step import Metrics

logger = logging.getLogger("jaxkd")

Dispatch = Callable[..., tuple[Any, Metrics]]


def make_dispatch(
    step: Callable[..., Any],
    feed: Feed,
    pick: Callable[[Any], jax.Array] | None = None,
) -> Dispatch:
    """Makes `dispatch(state, constants, items, teachers) -> (state, metrics)`.

    Args:
      step: `step(state, batch, teachers) -> (state, metrics)`, such as
        `step.make_train_step` makes; for several seeds, lifted.
      feed: makes batches of constants and items.
      pick: `pick(state) -> numbers` gives the records of every step, in place of those
        that its item names; for a feed of resident records.

    Returns:
      A pure function that runs as many steps as its items have rows; its metrics are
      those of each step, stacked.
    """

    def dispatch(
        state: Any, constants: Any, items: Any, teachers: Any
    ) -> tuple[Any, Metrics]:
        def body(state: Any, item: Any) -> tuple[Any, Metrics]:
            if pick is not None:
                item = {**item, "index": pick(state)}
            return step(state, feed.batch(constants, item), teachers)

        if _rows(items) > 1:
            return jax.lax.scan(body, state, items)
        # A loop of one round would only keep the compiler from looking into it.
        state, metrics = body(state, jax.tree.map(lambda x: x[0], items))
        return state, jax.tree.map(lambda x: x[None], metrics)

    return dispatch


def _rows(items: Any) -> int:
    return jax.tree.leaves(items)[0].shape[0]


def stack_items(items: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stacks the items of several steps; a single one is not copied."""
    if len(items) == 1:
        return {name: value[None] for name, value in items[0].items()}
    return {name: np.stack([item[name] for item in items]) for name in items[0]}


@dataclasses.dataclass
class Programs:
    """The compiled programs of a stage, one for each number of steps.

    Attributes:
      name: of the stage, for messages.
      dispatch: see `make_dispatch`.
      state_shardings: where the state lives.
      metrics_sharding: where the metrics live.
      reports: what the programs cost, by their number of steps.
    """

    name: str
    dispatch: Dispatch
    state_shardings: Any
    metrics_sharding: Any
    reports: dict[int, ProgramReport] = dataclasses.field(default_factory=dict)
    _compiled: dict[int, Dispatch] = dataclasses.field(default_factory=dict)

    def has(self, steps: int) -> bool:
        """Whether the program of so many steps is compiled."""
        return steps in self._compiled

    def prepare(self, *args: Any) -> Dispatch:
        """Compiles for arguments like these, if that has not been done, and tells.

        Args:
          *args: state, constants, items and teachers.
        """
        steps = _rows(args[2])
        if steps not in self._compiled:
            self._compiled[steps], report = compile_ahead(
                self.dispatch,
                *args,
                donate_argnums=0,
                out_shardings=(self.state_shardings, self.metrics_sharding),
            )
            self.reports[steps] = report
            logger.info("%s: %s", self.name, describe(report, steps))
        return self._compiled[steps]

    @property
    def flops_per_step(self) -> float | None:
        """Arithmetic of one step, as the first program counts it."""
        for steps, report in self.reports.items():
            return None if report.flops is None else report.flops / steps
        return None


def describe(report: ProgramReport, steps: int) -> str:
    """A program's report in one line."""
    several = f"{steps} steps" if steps > 1 else "the step"
    parts = [f"compiled {several} in {report.compile_seconds:.1f} s"]
    if report.flops is not None:
        parts.append(f"{report.flops / steps / 1e9:.3g} GFLOP per step")
    if report.peak_bytes is not None and report.temporary_bytes is not None:
        parts.append(
            f"{report.peak_bytes / 2**20:.0f} MiB per device "
            f"({report.temporary_bytes / 2**20:.0f} MiB of it temporary)"
        )
    return ", ".join(parts)
