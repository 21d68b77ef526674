"""Checkpoints: the only module that talks to Orbax.

A checkpoint holds the train state, the data iterator and a small JSON record. Saving
is asynchronous; the newest checkpoints and, if a score is given, the best one stay.
Whatever number of processes and devices wrote it, any other can read it, and may read
a part of it alone. What goes wrong is told in one line with what to do about it; errors
of the devices (`jax.errors.JaxRuntimeError`) pass through, as they say nothing of it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxkd.training.paths import path_name

_SCORE = "score"
_REASON_LENGTH = 240


def _worth_reading(record: logging.LogRecord) -> bool:
    """Whether the user should read what Orbax says.

    Not its complaint about checkpoints that have no score on purpose, and not the
    tracebacks of its threads: their errors are raised again where we wait for them.
    """
    told_later = record.exc_info is not None and "orbax" in record.pathname
    return not told_later and "did not provide metrics" not in record.getMessage()


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

        Raises:
          CheckpointError: this checkpoint, or the one before, cannot be written. What
            was complete before stays as it is.
        """
        if step in self._manager.all_steps():
            return
        metrics = None
        if score is not None:
            metrics = {_SCORE: score if math.isfinite(score) else -math.inf}
        with self._writing():
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
        with self._reading(step, abstract, abstract):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            if iterator is not None:
                iterator.set_state(dict(restored["data"]))
        return restored["state"], dict(restored["record"])

    def restore_part(
        self, step: int, abstract: Any, wanted: Callable[[str], bool]
    ) -> Any:
        """Reads some arrays of the state and leaves the others on the disk.

        Networks are evaluated without the optimiser's moments, which take twice their
        memory.

        Args:
          step: which checkpoint.
          abstract: the whole state as for `restore`.
          wanted: tells by its path, such as "params/network/conv/kernel", whether an
            array is read.

        Returns:
          The state; what is not wanted is the `jax.ShapeDtypeStruct` of `abstract`.

        Raises:
          CheckpointError: the checkpoint is damaged, or what is wanted does not fit.
        """

        def one(path: Any, leaf: jax.ShapeDtypeStruct) -> tuple[Any, Any]:
            if not wanted(path_name(path)):
                return ocp.PLACEHOLDER, ocp.RestoreArgs()
            # Without a shape in the arguments Orbax would cut or fill up silently.
            return leaf, ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
            )

        pairs = jax.tree.map_with_path(one, abstract)
        item, arguments = jax.tree.transpose(
            jax.tree.structure(abstract), jax.tree.structure((0, 0)), pairs
        )
        # The manager reads an item in one way only, and `restore` has another.
        with (
            self._reading(step, abstract, item),
            ocp.PyTreeCheckpointer() as checkpointer,
        ):
            found = checkpointer.restore(
                self._folder(step) / "state",
                args=ocp.args.PyTreeRestore(item=item, restore_args=arguments),
            )
        return jax.tree.map(
            lambda x, leaf: leaf if x is ocp.PLACEHOLDER else x, found, abstract
        )

    def latest(self) -> int | None:
        """The newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The checkpoint with the highest score, None if none has one."""
        return self._manager.best_step()

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          CheckpointError: see `save`.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads.

        Raises:
          CheckpointError: see `save`.
        """
        with self._writing():
            self._manager.close()

    def _folder(self, step: int) -> Any:
        return self._manager.directory / str(step)

    def _complete(self) -> list[int]:
        """The checkpoints that are on disk, whatever the manager was about to do."""
        folders = Path(self._manager.directory).glob("[0-9]*")
        return sorted(int(folder.name) for folder in folders if folder.name.isdigit())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Tells in one line what keeps a checkpoint from being written."""
        try:
            yield
        except Exception as error:  # Orbax raises what its storage layers raise.
            causes = _causes(error)
            complete = self._complete()
            go_on = f"goes on from step {complete[-1]}" if complete else "begins anew"
            raise CheckpointError(
                f"cannot write a checkpoint to {self._manager.directory} "
                f"({_reason(causes[-1])}); see that there is room and that it can be "
                f"written, then the same command {go_on}"
            ) from error

    @contextlib.contextmanager
    def _reading(self, step: int, abstract: Any, item: Any) -> Iterator[None]:
        """Tells in one line why a checkpoint cannot be read, and what may help.

        Args:
          step: which checkpoint.
          abstract: the whole state.
          item: the state without what is not read.
        """
        there, here = self._stored_shapes(step), _shapes(abstract)
        # Told before Orbax begins to read: it would leave reads behind that Python
        # warns of.
        for path, shape in _shapes(item).items():
            stored = there.get(path)
            if None not in (stored, shape) and stored != shape:
                raise self._unfit(
                    step, f"{path!r} has the shape {stored} there and {shape} now"
                )
        with warnings.catch_warnings():
            # Orbax warns when a checkpoint is read onto another number of devices.
            warnings.filterwarnings("ignore", message=".*[Ss]harding.*")
            try:
                yield
            except Exception as error:  # Orbax raises what its storage layers raise.
                causes = _causes(error)
                for path in sorted(here.keys() ^ there.keys() if there else ()):
                    text = f"it has no array {path!r}"
                    if path in there:
                        text = f"it has an array {path!r}, which is not there now"
                    raise self._unfit(step, text) from error
                raise CheckpointError(
                    f"checkpoint {self._folder(step)} cannot be read "
                    f"({_reason(causes[-1])}); {self._remedy(step, causes)}"
                ) from error

    def _unfit(self, step: int, difference: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self._folder(step)} does not fit: {difference}; go on with "
            "the config and the version of jaxkd that wrote it, or take another "
            "--workdir"
        )

    def _remedy(self, step: int, causes: list[BaseException]) -> str:
        """What helps against an error; a checkpoint is given up only if it is lost."""
        passing = any(isinstance(e, OSError | MemoryError) for e in causes)
        # So tensorstore marks what the operating system told it.
        if passing or "os_error_code" in str(causes[-1]):
            return (
                "it may be whole: see that its files are there and can be read, then "
                "run the same command again"
            )
        complete = self._complete()
        older = [other for other in complete if other < step]
        if older and step == complete[-1]:
            return f"it is damaged: delete that folder to go on from step {older[-1]}"
        return (
            "it is damaged: restore that folder from a copy, or take another --workdir"
        )

    def _stored_shapes(self, step: int) -> dict[str, tuple[int, ...] | None]:
        """The shapes of a stored state by path; none if they cannot be read."""
        try:
            handler = ocp.PyTreeCheckpointHandler()
            return _shapes(handler.metadata(self._folder(step) / "state").tree)
        except Exception:  # The restore that follows tells what is wrong.
            return {}


def _causes(error: Exception) -> list[BaseException]:
    """An error and what it came from, the origin last.

    Raises:
      JaxRuntimeError: it came from the devices, not from the checkpoint.
    """
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        if isinstance(cause, jax.errors.JaxRuntimeError):
            raise cause
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes


def _reason(error: BaseException) -> str:
    """The text of an error on one line; what matters stands at both ends."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= _REASON_LENGTH:
        return text
    half = _REASON_LENGTH // 2
    return f"{text[:half]} ... {text[-half:]}"


def _shapes(tree: Any) -> dict[str, tuple[int, ...] | None]:
    """The shapes of a state by path; None for random keys, which are stored as data."""
    shapes = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        if hasattr(leaf, "shape"):
            key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            shapes[path_name(path)] = None if key else tuple(leaf.shape)
    return shapes


def abstract_like(tree: Any, shardings: Any) -> Any:
    """`jax.ShapeDtypeStruct`s with shardings, the target of `Checkpoints.restore`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
