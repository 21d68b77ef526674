"""How many optimiser steps go into one call of the devices, and what that takes.

A call ends where the stage is judged or saved. Its items are stacked on the host before
they are sent, so a long call of streamed batches needs memory for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from jax.sharding import Mesh

from jaxkd.data import Source
from jaxkd.training import sharding
from jaxkd.training.feeds import streamed_bytes
from jaxkd.training.plan import Plan
from jaxkd.training.stage import Stage

# Steps that the devices may have in reserve, beside those they work on.
_STEPS_AHEAD = 3
# What the items of one call may take in a process; two calls more are on the devices.
LARGEST_CALL_BYTES = 2**30
# Programs of different numbers of steps that a stage compiles.
_PROGRAMS = 4


def periods(plan: Plan, steps_per_epoch: int) -> tuple[int, ...]:
    """After how many steps, again and again, a stage is saved or judged."""
    found = [plan.checkpoint.every_steps or steps_per_epoch]
    if plan.evaluation.every_epochs:
        found.append(plan.evaluation.every_epochs * steps_per_epoch)
    return tuple(found)


def longest_call(plan: Plan, stage: Stage) -> int:
    """The most steps that any call of a stage has."""
    per_epoch = stage.steps_per_epoch
    several = plan.train.steps(per_epoch)
    return min(several, stage.total_steps, *periods(plan, per_epoch))


def calls_ahead(steps: int) -> int:
    """How many calls may be unfinished while the host prepares the next one.

    The host looks for signals and at losses between calls, and then waits for all
    that the devices were given: two long calls at most, or four of a single step,
    which absorb a host that is late once.

    Args:
      steps: of each call.
    """
    return max(1, _STEPS_AHEAD // steps)


def choose_steps(wanted: int, compiled: Collection[int]) -> int:
    """The steps of the next call.

    Stops at changing distances would ask for a program each. Four are compiled, one of
    them of a single step; then a call has as many steps as one of these.

    Args:
      wanted: the steps to the next stop, or of a whole call if these are fewer.
      compiled: the numbers of steps for which there is a program.
    """
    known = {1, *compiled}
    if wanted in known or len(known) < _PROGRAMS:
        return wanted
    return max(steps for steps in known if steps <= wanted)


def check_call(
    plan: Plan,
    stage: Stage,
    mesh: Mesh,
    *,
    train: Source,
    unlabelled: Source | None,
    resident: bool,
) -> None:
    """Checks that the items of a stage's longest call fit into the host's memory.

    Args:
      plan: of the run.
      stage: the stage.
      mesh: the devices.
      train: the training records.
      unlabelled: the unlabelled ones, if there are any.
      resident: whether the training records live on the devices.

    Raises:
      ValueError: they take more than 1 GiB; the message says what fits.
    """
    steps = longest_call(plan, stage)
    if steps == 1:
        return
    parts = {}
    if not resident:
        records = plan.data.batch_size
        if plan.data.regions is not None:
            records //= plan.data.region_crops
        parts["images"] = records * streamed_bytes(train)
        if unlabelled is not None:
            size = plan.data.unlabelled_batch_size or 0
            parts["images"] += size * streamed_bytes(unlabelled)
    if stage.stored is not None:
        fields = stage.stored.fields.values()
        parts["targets"] = plan.data.batch_size * sum(field.nbytes for field in fields)
    processes = sharding.process_part(mesh)[1]
    size = sum(parts.values()) * max(1, len(plan.seeds)) // processes
    if steps * size > LARGEST_CALL_BYTES:
        raise ValueError(_too_large(stage.name, steps, size, parts))


def _too_large(stage: str, steps: int, size: int, parts: Mapping[str, int]) -> str:
    most = max(1, LARGEST_CALL_BYTES // size)
    # Only images can live on the devices.
    mebibytes = math.ceil(steps * size / 2**20)
    text = (
        f"a call of stage {stage!r} would stack {steps} steps, {mebibytes} MiB in "
        f"the host's memory, and at most {LARGEST_CALL_BYTES // 2**20} MiB are "
        f"allowed; set it to {most} or less"
    )
    if parts.get("images", 0) > parts.get("targets", 0):
        text += (
            ", or set config.train.resident=True, which keeps the records on the "
            "devices"
        )
    return text
