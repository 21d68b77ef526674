"""What a stage tells while it runs: means over windows of steps, and its times."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import numpy as np

from jaxkd.training.setup import Setup
from jaxkd.training.stage import Stage
from jaxkd.training.workdir import MetricsWriter

# An update that overflows would spoil the parameters that are saved after the step.
_MUST_BE_FINITE = ("loss", "grad_norm", "update_norm")


class TrainingFailed(Exception):
    """The run cannot go on; the text is one line for the user."""


@dataclasses.dataclass
class Clock:
    """Times of a stage over all its interruptions.

    Attributes:
      seconds: in the loop, with compilation, evaluation and saving.
      step_seconds: in `steps` training steps alone, without the first of each process.
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


class Window:
    """The metrics of the steps since the last flush; they stay on the devices.

    Args:
      setup: the run.
      stage: the stage.
      writer: where the means go.
      step: the steps done so far.
      clock: gets the times.
    """

    def __init__(
        self,
        setup: Setup,
        stage: Stage,
        writer: MetricsWriter,
        *,
        step: int,
        clock: Clock,
    ):
        self._setup, self._stage, self._writer = setup, stage, writer
        self._clock = clock
        self._first = step
        self._metrics: list[Any] = []
        self.shown: dict[str, str] = {}
        self.restart()

    def restart(self) -> None:
        """Starts the step clock, after compilation, an evaluation or a save."""
        self._started = time.monotonic()
        self._timed = 0
        self.data_seconds = 0.0

    def add(self, metrics: Any, *, timed: bool) -> None:
        """Keeps the metrics of one step; an untimed step restarts the clock."""
        self._metrics.append(metrics)
        if timed:
            self._timed += 1
        else:
            self.restart()

    def flush(self, step: int) -> dict[str, str]:
        """Reads the metrics, checks them and writes their means.

        Raises:
          TrainingFailed: a value is not finite; the steps and terms are named.
        """
        if not self._metrics:
            return self.shown
        setup, stage = self._setup, self._stage
        values = jax.device_get(self._metrics)
        elapsed = time.monotonic() - self._started
        self._check(values)
        loss = float(np.mean([v["loss"] for v in values]))
        record = {
            "kind": "train",
            "stage": stage.name,
            "step": step,
            "epoch": step / stage.steps_per_epoch,
            "loss": loss,
            "terms": {
                k: float(np.mean([v["terms"][k] for v in values]))
                for k in values[0]["terms"]
            },
            "grad_norm": float(np.mean([v["grad_norm"] for v in values])),
            "learning_rate": float(values[-1]["learning_rate"]),
        }
        self.shown["loss"] = f"{loss:.4f}"
        if self._timed:
            rate = self._timed * setup.plan.data.batch_size / elapsed
            record["images_per_second"] = rate
            record["step_seconds"] = elapsed / self._timed
            record["data_seconds"] = self.data_seconds / self._timed
            self._clock.step_seconds += elapsed
            self._clock.steps += self._timed
            self.shown["img/s"] = f"{rate:.0f}"
        if stage.teachers:
            record["teacher_share"] = teacher_share(setup, stage)
        self._writer.write(record)
        self._metrics, self._first = [], step
        self.restart()
        return self.shown

    def _check(self, values: list[Any]) -> None:
        for i, value in enumerate(values):
            bad = [k for k, v in value["terms"].items() if not np.isfinite(v)]
            names = [k for k in _MUST_BE_FINITE if not np.isfinite(value[k])]
            if bad or names:
                what = ", ".join(f"term {k!r}" for k in bad) or names[0]
                raise TrainingFailed(
                    f"stage {self._stage.name!r}, step {self._first + i + 1}: "
                    f"{what} is not finite, and the step is not saved; in a new "
                    "--workdir try a lower learning rate, optimizer.clip_norm or "
                    "precision='float32'"
                )


def teacher_share(setup: Setup, stage: Stage) -> float:
    """The teachers' part of a step's arithmetic, counted (not measured).

    A step costs one forward pass per teacher and, for the student, a forward pass and
    twice as much for the backward pass.
    """
    teachers = sum(setup.costs[t.name].macs for t in stage.teachers)
    students = sum(setup.costs[name].macs for name in stage.learners)
    return teachers / (teachers + 3 * students)
