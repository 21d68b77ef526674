"""What a stage tells while it runs: means over windows of steps, and its times."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxkd.training.setup import Setup
from jaxkd.training.stage import Stage

# An update that overflows would spoil the parameters that are saved after the step.
_MUST_BE_FINITE = ("loss", "grad_norm", "update_norm")


class TrainingFailed(Exception):
    """The run cannot go on; the text is one line for the user."""


@dataclasses.dataclass
class Clock:
    """Times of a stage over all its interruptions.

    Attributes:
      seconds: in the loop, with compilation, evaluation and saving.
      step_seconds: in training steps alone.
      steps: how many those are.
    """

    seconds: float = 0.0
    step_seconds: float = 0.0
    steps: int = 0

    def start(self) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    def stop(self) -> None:
        """Adds the time since `start`, and starts again."""
        now = time.monotonic()
        self.seconds += now - self._started
        self._started = now

    def images_per_second(self, batch_size: int) -> float:
        """Images per second of training steps; NaN if none was timed."""
        if not self.steps:
            return math.nan
        return self.steps * batch_size / self.step_seconds


@dataclasses.dataclass(kw_only=True)
class Meter:
    """Follows the steps of a stage: what runs, what came out, how long it took.

    The host may be ahead of the devices (see `calls.calls_ahead`), so that they never
    wait for it. Metrics stay on the devices until a window of `log.every_steps` steps
    is complete, and then come to the host together.

    Attributes:
      stage: the stage's name.
      write: takes a record.
      step: the steps that the devices have been given so far.
      clock: gets the times.
      every_steps: steps of a window.
      steps_per_epoch: of the stage.
      images_per_step: over all devices and seeds.
      teacher_share: see `teacher_share`, None without teachers.
      flops_per_step: arithmetic of a step, None if unknown.
      ceiling: FLOP/s that the devices could reach, None if unknown.
      shown: what a progress bar says.
    """

    stage: str
    write: Callable[[dict[str, Any]], None]
    step: int
    clock: Clock
    every_steps: int
    steps_per_epoch: int
    images_per_step: int
    teacher_share: float | None = None
    flops_per_step: float | None = None
    ceiling: float | None = None
    shown: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self._running: collections.deque[_Dispatched] = collections.deque()
        self._window: list[_Step] = []
        self.restart()

    def restart(self) -> None:
        """Starts the step clock, after a compilation, an evaluation or a save."""
        self._mark = time.monotonic()

    def dispatched(self, steps: int, metrics: Any, *, data_seconds: float) -> None:
        """Takes the metrics of steps that the devices have been given.

        Args:
          steps: how many.
          metrics: their metrics, stacked.
          data_seconds: the host's time to get their data.
        """
        if (self.step + steps) // self.every_steps > self.step // self.every_steps:
            # A window ends here: what is read first is on its way when it is done.
            for leaf in jax.tree.leaves(metrics):
                if leaf.is_fully_addressable:
                    leaf.copy_to_host_async()
        self._running.append(
            _Dispatched(self.step, steps, metrics, data_seconds / steps)
        )
        self.step += steps

    def settle(self, running: int) -> None:
        """Waits until at most so many dispatches are unfinished; writes full windows.

        Raises:
          TrainingFailed: a value is not finite; the steps and terms are named.
        """
        while len(self._running) > running:
            done = self._running.popleft()
            jax.block_until_ready(done.metrics)
            now = time.monotonic()
            seconds = (now - self._mark) / done.steps
            self._mark = now
            for i in range(done.steps):
                step = done.first + i + 1
                self._window.append(_Step(step, seconds, done, i))
                if step % self.every_steps == 0:
                    self._flush()

    def drain(self) -> None:
        """Waits for all steps and writes what has not been written.

        Raises:
          TrainingFailed: a value is not finite; the steps and terms are named.
        """
        self.settle(0)
        self._flush()

    def _flush(self) -> None:
        """Checks the values of the window's steps and writes their means."""
        window, self._window = self._window, []
        if not window:
            return
        _read([step.dispatched for step in window])
        values = [step.values() for step in window]
        for step, value in zip(window, values, strict=True):
            self._check(step.step, value)
        last, seconds = window[-1].step, sum(step.seconds for step in window)
        self.clock.step_seconds += seconds
        self.clock.steps += len(window)
        losses = np.stack([v["loss"] for v in values])
        record: dict[str, Any] = {
            "kind": "train",
            "stage": self.stage,
            "step": last,
            "epoch": last / self.steps_per_epoch,
            "loss": float(losses.mean()),
            "terms": {k: _mean(v["terms"][k] for v in values) for k in _terms(values)},
            "grad_norm": _mean(v["grad_norm"] for v in values),
            "learning_rate": _mean([values[-1]["learning_rate"]]),
            "images_per_second": len(window) * self.images_per_step / seconds,
            "step_seconds": seconds / len(window),
            "data_seconds": sum(s.dispatched.data_seconds for s in window)
            / len(window),
        }
        if "facts" in values[-1]:
            last_facts = values[-1]["facts"]
            record["facts"] = {k: _mean([v]) for k, v in last_facts.items()}
        if losses.ndim > 1:
            record["loss_by_seed"] = [float(loss) for loss in losses.mean(axis=0)]
        if self.teacher_share is not None:
            record["teacher_share"] = self.teacher_share
        if self.flops_per_step is not None:
            rate = self.flops_per_step * len(window) / seconds
            record["flops_per_second"] = rate
            if self.ceiling is not None:
                record["ceiling_share"] = rate / self.ceiling
        self.shown["loss"] = f"{record['loss']:.4f}"
        self.shown["img/s"] = f"{record['images_per_second']:.0f}"
        self.write(record)

    def _check(self, step: int, value: Any) -> None:
        bad = [k for k, v in value["terms"].items() if not np.isfinite(v).all()]
        names = [k for k in _MUST_BE_FINITE if not np.isfinite(value[k]).all()]
        if bad or names:
            what = ", ".join(f"term {k!r}" for k in bad) or names[0]
            raise TrainingFailed(
                f"stage {self.stage!r}, step {step}: "
                f"{what} is not finite, and the step is not saved; in a new "
                "--workdir try a lower learning rate, optimizer.clip_norm or "
                "precision='float32'"
            )


@dataclasses.dataclass
class _Dispatched:
    """Steps that the devices got at once: the steps before them, and how many.

    `host` holds the metrics once they are read.
    """

    first: int
    steps: int
    metrics: Any
    data_seconds: float
    host: Any = None


def _read(dispatches: Iterable[_Dispatched]) -> None:
    """Brings metrics to the host as NumPy arrays, all in one go, each once."""
    unread = list({id(d): d for d in dispatches if d.host is None}.values())
    found = jax.device_get([d.metrics for d in unread])
    for dispatched, host in zip(unread, found, strict=True):
        dispatched.host = host


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step that is done, and where its metrics are."""

    step: int
    seconds: float
    dispatched: _Dispatched
    row: int

    def values(self) -> Any:
        return jax.tree.map(lambda x: x[self.row], self.dispatched.host)


def _mean(values: Iterable[Any]) -> float:
    return float(np.mean([np.mean(value) for value in values]))


def _terms(values: list[Any]) -> list[str]:
    return list(values[0]["terms"])


def teacher_share(setup: Setup, stage: Stage) -> float | None:
    """The teachers' part of a step's arithmetic, counted (not measured).

    A step costs one forward pass per teacher and, for the student, a forward pass and
    twice as much for the backward pass. None if no teacher runs.
    """
    if not stage.live_teachers:
        return None
    teachers = sum(setup.costs[t.name].macs for t in stage.live_teachers)
    students = sum(setup.costs[name].macs for name in stage.learners)
    return teachers / (teachers + 3 * students)
