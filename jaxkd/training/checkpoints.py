"""Checkpoints: the only module that talks to Orbax.

A checkpoint holds the train state, the data iterator and a small JSON record. Saving
is asynchronous; the newest checkpoints and, if a score is given, the best one stay.
Whatever number of processes and devices wrote it, any other can read it.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

_SCORE = "score"


def _worth_reading(record: logging.LogRecord) -> bool:
    """False for Orbax's complaint about checkpoints that have no score on purpose."""
    return "did not provide metrics" not in record.getMessage()


class CheckpointError(Exception):
    """A checkpoint cannot be used; the text is one line for the user."""


class Checkpoints:
    """The checkpoints of one stage.

    Args:
      directory: where they are; made if missing.
      keep: how many of the newest stay.
    """

    def __init__(self, directory: Path, *, keep: int = 1):
        logger = logging.getLogger("absl")
        logger.setLevel(logging.WARNING)
        logger.addFilter(_worth_reading)
        managers = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(
                [
                    managers.LatestN(keep),
                    managers.BestN(
                        get_metric_fn=lambda m: m[_SCORE],
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            best_fn=lambda metrics: metrics[_SCORE],
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(
        self,
        step: int,
        state: Any,
        iterator: grain.DatasetIterator,
        record: Mapping[str, Any],
        *,
        score: float | None = None,
    ) -> None:
        """Begins to save; the arrays may be donated as soon as this returns.

        Args:
          step: optimiser steps done. A step that is already saved is left alone.
          state: the train state.
          iterator: the data iterator, standing before the batch of the next step.
          record: JSON values to get back with the state.
          score: larger is better; None if this step was not evaluated.
        """
        if step in self._manager.all_steps():
            return
        metrics = None
        if score is not None:
            metrics = {_SCORE: score if math.isfinite(score) else -math.inf}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                record=ocp.args.JsonSave(dict(record)),
                # Not grain's own handler, which keeps a file for each process.
                data=ocp.args.JsonSave(iterator.get_state()),
            ),
            metrics=metrics,
        )

    def restore(
        self,
        step: int,
        abstract: Any,
        iterator: grain.DatasetIterator | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Reads the state onto the devices that `abstract` names.

        Args:
          step: which checkpoint.
          abstract: the state as `jax.ShapeDtypeStruct` with shardings.
          iterator: set to where the checkpoint's iterator stood.

        Returns:
          The state and the record.

        Raises:
          CheckpointError: the checkpoint is damaged or does not fit `abstract`.
        """
        items = {
            "state": ocp.args.StandardRestore(abstract),
            "record": ocp.args.JsonRestore(),
        }
        if iterator is not None:
            items["data"] = ocp.args.JsonRestore()
        with warnings.catch_warnings():
            # Orbax warns when a checkpoint is read onto another number of devices.
            warnings.filterwarnings("ignore", message=".*[Ss]harding.*")
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(**items))
                if iterator is not None:
                    iterator.set_state(dict(restored["data"]))
            except Exception as error:  # Orbax raises what its storage layers raise.
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise CheckpointError(
                    f"checkpoint {self._manager.directory / str(step)} cannot be read "
                    f"({reason}); delete that folder to go on from the one before"
                ) from error
        return restored["state"], dict(restored["record"])

    def latest(self) -> int | None:
        """The newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The checkpoint with the highest score, None if none has one."""
        return self._manager.best_step()

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads."""
        self._manager.close()


def abstract_like(tree: Any, shardings: Any) -> Any:
    """`jax.ShapeDtypeStruct`s with shardings, the target of `Checkpoints.restore`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
