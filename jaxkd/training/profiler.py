"""Traces of some steps of a stage, written by the first process."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import jax

from jaxkd.training.progress import Meter

logger = logging.getLogger("jaxkd")

# Calls before a trace begins: the first ones are slower than the rest.
_UNTRACED = 2


class Profiler(contextlib.AbstractContextManager):
    """Writes a trace of some steps of a stage, if the config asks for it.

    Processes that share a folder would spoil each other's traces, so process 0 alone
    traces its devices; all run the same programs.

    Args:
      stage: the stage's name, for messages.
      folder: where the trace is written.
      steps: how many steps are traced; 0 for none.
    """

    def __init__(self, stage: str, folder: Path, *, steps: int):
        self._stage, self._folder = stage, folder
        self._left = steps if jax.process_index() == 0 else 0
        self._calls, self._running = 0, False

    def before(self, meter: Meter) -> None:
        """Starts the trace before its first call."""
        self._calls += 1
        if self._left and not self._running and self._calls > _UNTRACED:
            meter.settle(0)
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._running = True
            # Starting takes seconds, which are no step's time.
            meter.restart()

    def after(self, meter: Meter, steps: int) -> None:
        """Ends the trace after its last step.

        Args:
          meter: of the stage.
          steps: those of the call that was made.
        """
        if not self._running:
            return
        self._left = max(self._left - steps, 0)
        if not self._left:
            meter.settle(0)
            self._stop()
            meter.restart()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running, self._left = False, 0
        logger.info("%s: trace of some steps: %s", self._stage, self._folder)

    def __exit__(self, *error: Any) -> None:
        """Ends a trace that a stage was too short for, or tells that there is none."""
        if self._running:
            self._stop()
        elif self._left and self._calls and error[0] is None:
            logger.warning(
                "%s: no trace, as it begins after %d calls and the stage made %d; "
                "lower config.train.steps_per_call, or train longer",
                self._stage,
                _UNTRACED,
                self._calls,
            )
