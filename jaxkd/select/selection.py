"""Selection as a value: which records a step trains on.

A `Selection` is a few pure functions over a state that travels with the training state.
It does one of these, each with static shapes and without leaving the devices:

* it *picks* the records of every step, instead of the data's own order;
* it *keeps* some records of every batch before the networks that learn see it, so that
  the others cost a forward pass of a scoring network and nothing more;
* it *weighs* the records of a batch by their losses: those that are not selected have
  weight 0, and so exactly no gradient.

After the step it is told the losses. It never knows the networks or the method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax

State = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionData:
    """What a selection is told of the data.

    Attributes:
      records: of the training split; their numbers run from 0.
      batch_size: records of a step, over all devices.
      steps_per_epoch: full batches per epoch.
      epochs: of the stage.
    """

    records: int
    batch_size: int
    steps_per_epoch: int
    epochs: int


@runtime_checkable
class InitFn(Protocol):
    """`init(key, data) -> state`, a tree of arrays.

    Raises:
      ValueError: the selection does not fit the data.
    """

    def __call__(self, key: jax.Array, data: SelectionData) -> State:
        """Returns the state before the first step."""
        ...


@runtime_checkable
class PickFn(Protocol):
    """`pick(state) -> numbers`, int32 `[batch]`."""

    def __call__(self, state: State) -> jax.Array:
        """Returns the numbers of the records of the next step."""
        ...


@runtime_checkable
class UpcomingFn(Protocol):
    """`upcoming(state) -> (numbers, count)`, int32 `[steps, batch]` and int32.

    The records of the next `count` steps, which no loss can change any more; rows from
    `count` on mean nothing. For data that a host reads and sends.
    """

    def __call__(self, state: State) -> tuple[jax.Array, jax.Array]:
        """Returns the records of the next steps."""
        ...


@runtime_checkable
class WeighFn(Protocol):
    """`weigh(state, losses, key) -> weights`, float32 `[batch]`.

    The loss of the step is the mean of weights times losses, so the weights of a mean
    over `k` of `n` records are `n/k` and 0.
    """

    def __call__(self, state: State, losses: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the weight of every record of the batch."""
        ...


@runtime_checkable
class KeepFn(Protocol):
    """`keep(scores) -> positions`, int32 `[kept]`, ascending."""

    def __call__(self, scores: jax.Array) -> jax.Array:
        """Returns the places in the batch of the records to train on."""
        ...


@runtime_checkable
class RecordFn(Protocol):
    """`record(state, numbers, losses, step) -> state`."""

    def __call__(
        self, state: State, numbers: jax.Array, losses: jax.Array, step: jax.Array
    ) -> State:
        """Returns the state for the next step.

        Args:
          state: the state of this step.
          numbers: of the records of the step, int32 `[batch]`.
          losses: of these records before the update, float32 `[batch]`.
          step: the steps done before this one.
        """
        ...


@runtime_checkable
class BeginFn(Protocol):
    """`begin(state, scores) -> state`, given the score of every record."""

    def __call__(self, state: State, scores: jax.Array) -> State:
        """Returns the state before the first step.

        Args:
          state: what `init` made.
          scores: float32 `[records]`.
        """
        ...


def _nothing(key: jax.Array, data: SelectionData) -> State:
    del key, data
    return {}


def _forget(
    state: State, numbers: jax.Array, losses: jax.Array, step: jax.Array
) -> State:
    del numbers, losses, step
    return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """A way to choose what to train on.

    Attributes:
      init: see `InitFn`.
      pick: see `PickFn`; None leaves the order to the data.
      upcoming: see `UpcomingFn`; every selection that picks has it.
      weigh: see `WeighFn`; None weighs all records alike.
      keep: see `KeepFn`; None keeps the whole batch. Its scores are the losses of the
        scoring network by the labels.
      scorer: the network whose losses are the scores: a name of the config, or None for
        the student itself.
      record: see `RecordFn`.
      raters: networks trained by earlier stages, whose mean rating of every record
        `begin` wants before the first step.
      rate: `rate(logits, labels) -> float32 [batch]`, a network's rating of records.
      begin: see `BeginFn`; None without raters.
      facts: numbers of the state for the log, `{name: scalar}`.
    """

    init: InitFn = _nothing
    pick: PickFn | None = None
    upcoming: UpcomingFn | None = None
    weigh: WeighFn | None = None
    keep: KeepFn | None = None
    scorer: str | None = None
    record: RecordFn = _forget
    raters: tuple[str, ...] = ()
    rate: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    begin: BeginFn | None = None
    facts: Callable[[State], dict[str, jax.Array]] = lambda state: {}
