"""Selections beside the compiled step: ratings before it, records that a host reads."""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.data import Source, pipeline
from jaxkd.select import Selection
from jaxkd.training import sharding
from jaxkd.training.network import Variables
from jaxkd.training.setup import Setup
from jaxkd.training.state import TrainState


def rate_records(
    setup: Setup, selection: Selection, variables: Callable[[str], Variables]
) -> jax.Array:
    """What a selection's raters make of every training record, on average.

    Args:
      setup: the run.
      selection: has `raters` and `rate`.
      variables: gives a network's variables by its name.

    Returns:
      float32 `[records]`, or `[seeds, records]`.
    """
    rate = selection.rate
    if rate is None:
        raise ValueError("the selection has raters, but no rate")
    totals = []
    for name in selection.raters:
        network = setup.networks[name]

        def values(own: Variables, batch: Any, apply: Any = network.apply) -> jax.Array:
            batch = setup.plan.data.augment.evaluate(batch)
            outputs, _ = apply(own, batch["image"], train=False, key=None)
            return rate(outputs.logits.astype(jnp.float32), batch["label"])

        if setup.seeds.several:
            values = jax.vmap(values, in_axes=(0, None))
        run = jax.jit(values, out_shardings=sharding.replicated(setup.mesh))
        part, parts = sharding.process_part(setup.mesh)
        size = setup.plan.data.batch_size
        batches = pipeline.eval_batches(
            setup.train, batch_size=size, process_index=part, process_count=parts
        )
        own, found = variables(name), []
        for batch in batches:
            given = {key: batch[key] for key in ("image", "label")}
            placed = sharding.put_batch(given, setup.mesh)
            found.append(np.asarray(run(own, placed)))
        rated = np.concatenate(found, axis=-1)[..., : len(setup.train)]
        totals.append(rated)
    return jnp.asarray(np.mean(totals, axis=0), jnp.float32)


class PickedItems(grain.DatasetIterator):
    """Batches of the records that a selection picks, read by the host.

    The host asks the devices for the records of the coming steps only where losses
    decide them, and reads ahead up to there.

    Args:
      source: the records.
      selection: picks them.
      part: which part of every batch this process reads.
      parts: how many parts there are.
      ahead: how many batches are read ahead.
    """

    # It stands where grain's iterators stand, in checkpoints as well.

    def __init__(
        self,
        source: Source,
        selection: Selection,
        *,
        part: int = 0,
        parts: int = 1,
        ahead: int = 2,
    ):
        super().__init__()
        if selection.upcoming is None:
            raise ValueError("a selection that picks must tell what is upcoming")
        self._source = source
        self._upcoming = jax.jit(selection.upcoming)
        self._part, self._parts, self._ahead = part, parts, ahead
        self._numbers: collections.deque[np.ndarray] = collections.deque()
        self._reading: collections.deque[Future[Any]] = collections.deque()
        self._threads = ThreadPoolExecutor(max_workers=ahead)

    def __next__(self) -> dict[str, np.ndarray]:
        raise TypeError("the records depend on the state: call following(state)")

    def following(self, state: TrainState) -> dict[str, np.ndarray]:
        """The next batch, this process's part of it.

        Args:
          state: of the training before the step that it is for.
        """
        if not self._numbers and not self._reading:
            numbers, count = jax.device_get(self._upcoming(state.selection))
            self._numbers.extend(numbers[: int(count)])
        while self._numbers and len(self._reading) < self._ahead:
            rows = np.split(self._numbers.popleft(), self._parts)[self._part]
            read = self._threads.submit(pipeline.read_records, self._source, rows)
            self._reading.append(read)
        return self._reading.popleft().result()

    def get_state(self) -> dict[str, Any]:
        """Nothing: the selection's state says what comes next."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Forgets what was read ahead."""
        del state
        self._numbers.clear()
        self._reading.clear()

    def close(self) -> None:
        """Ends the threads that read."""
        self._threads.shutdown(cancel_futures=True)
