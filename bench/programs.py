"""The compiled programs of the command, called by hand: what the scripts here time.

A `Training` is one stage of a plan, with the feed, the state and the programs that
`python -m jaxkd.main` would make of it.
"""

from __future__ import annotations

import collections
import functools
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from measuring import Mistake, Side

from jaxkd.training import ConfigError, Plan, Setup, Stage, make_setup
from jaxkd.training.assembly import Known, assemble, untrained
from jaxkd.training.calls import calls_ahead
from jaxkd.training.config import apply_overrides, load_config
from jaxkd.training.target_files import StageTargets

ROOT = Path(__file__).resolve().parent.parent


def set_up(config: Mapping[str, Any]) -> Setup:
    """The objects of a run.

    Raises:
      Mistake: the config is wrong.
    """
    try:
        return make_setup(Plan.from_config(config))
    except ConfigError as error:
        raise Mistake(str(error)) from error


def configured(spec: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config file of `configs/` with values changed, as the command would do it.

    Args:
      spec: `FILE.py:variant`.
      changes: values by their paths, such as `data.batch_size`.

    Raises:
      Mistake: there is no such config.
    """
    try:
        config = load_config(str(ROOT / "configs" / spec))
        return apply_overrides(config, [(k, str(v)) for k, v in changes.items()])
    except ConfigError as error:
        raise Mistake(str(error)) from error


class Training:
    """One stage of a run, ready to be called; networks that it needs are untrained.

    Args:
      setup: the run.
      stage: the stage.
      repeat: whether all calls get the same items, which then lie ready on the devices.
      targets: what the stage reads instead of running its teachers.
    """

    def __init__(
        self,
        setup: Setup,
        stage: Stage,
        *,
        repeat: bool = False,
        targets: StageTargets | None = None,
    ):
        self.steps = setup.plan.train.steps(stage.steps_per_epoch)
        self.images = self.steps * setup.plan.images_per_step
        known = Known(setup, functools.partial(untrained, setup))
        self._assembly = assemble(setup, stage, known, targets=targets)
        self._state = self._assembly.begin(known)
        items = self._assembly.items
        self._kept = items(self.steps, self._state) if repeat else None
        self.programs = self._assembly.programs
        self.parameters = {
            **{t.name: count(known(t.name)["params"]) for t in stage.live_teachers},
            "student": count(self._state.params["network"]),
        }

    def compile(self) -> Any:
        """Compiles the program without running it, and returns it."""
        return self.programs.prepare(*self._arguments())

    @property
    def bytes_per_device(self) -> dict[str, int]:
        """What the state and the live teachers take on each device."""
        trees = {"state": self._state, "teachers": self._assembly.teachers}
        return {name: bytes_of_part(tree) for name, tree in trees.items()}

    def run(self, calls: int) -> float:
        """Calls the program, waits for the devices, and returns the last loss."""
        running: collections.deque[Any] = collections.deque()
        metrics: Any = None
        for _ in range(calls):
            args = self._arguments()
            self._state, metrics = self.programs.prepare(*args)(*args)
            running.append(metrics)
            # As in the command's loop.
            if len(running) > calls_ahead(self.steps):
                jax.block_until_ready(running.popleft())
        jax.block_until_ready(self._state)
        return float(metrics["loss"][-1])

    def side(self, *, steps: int) -> Side:
        """The stage as a side whose rounds have so many steps.

        Raises:
          Mistake: a call has another number of steps, and does not divide it.
        """
        if steps % self.steps:
            raise Mistake(f"{self.steps} steps per call do not divide {steps} steps")
        return Side(self.run, self.images, steps // self.steps)

    def close(self) -> None:
        """Ends the threads that read."""
        self._assembly.close()

    def _arguments(self) -> tuple[Any, ...]:
        assembly = self._assembly
        items = self._kept
        if items is None:
            items = assembly.items(self.steps, self._state)
        return assembly.arguments(self._state, items)


def bytes_of_part(tree: Any) -> int:
    """The bytes of a tree of arrays on the first of their devices."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def count(params: Any) -> int:
    """The number of values in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def recipes() -> Any:
    """The module `configs/shared.py`, with the recipe of every method."""
    folder = str(ROOT / "configs")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("shared")
