"""From a source to numpy batches: shuffling, sharding over processes, exact resume.

The order of the records is a function of `(seed, epoch)` and of the number of records
alone. Processes take consecutive parts of each global batch, so that any number of them
trains on the same global batches; worker processes and threads only change who reads.
Both pipelines are random-access sequences of batches which grain reads ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from jaxkd.data.source import Source

if TYPE_CHECKING:
    from jaxkd.data._iterator import BatchIterator

Batch = dict[str, np.ndarray]


@runtime_checkable
class Extra(Protocol):
    """`extra(epoch, indices)`: further entries of a batch, each `[b, ...]`."""

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        """Returns the entries of the records `indices` in an epoch."""
        ...


class TrainBatches:
    """Shuffled training batches over a number of epochs: see `train_batches`.

    `batches[step]` is a batch by its number, `iter(batches)` reads ahead and can be
    saved and restored, `len(batches)` is the total number of steps.

    Attributes:
      steps_per_epoch: full batches in one epoch; the remainder is dropped, and because
        each epoch is shuffled anew, other records are dropped in the next.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        epochs: int,
        workers: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        extra: Extra | None = None,
    ):
        self._first, self._last = _process_rows(
            batch_size, process_index, process_count
        )
        if len(source) < batch_size:
            raise ValueError(
                f"the data set has {len(source)} records, fewer than one batch of "
                f"{batch_size}; choose a smaller batch_size"
            )
        if epochs < 1:
            raise ValueError(f"epochs must be >= 1, got {epochs}")
        if workers < 0:
            raise ValueError(f"workers must be >= 0, got {workers}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        self._source = source
        self._batch_size = batch_size
        self._seed = seed
        self._epochs = epochs
        self._extra = extra
        self.workers = workers
        self._order: tuple[int, np.ndarray] | None = None
        self.steps_per_epoch = len(source) // batch_size

    def __len__(self) -> int:
        return self._epochs * self.steps_per_epoch

    def __getitem__(self, step: int) -> Batch:
        numbers = self.numbers(step)
        return {**read_records(self._source, numbers["index"]), **numbers}

    def __iter__(self) -> BatchIterator:
        from jaxkd.data._iterator import BatchIterator

        return BatchIterator(self, workers=self.workers)

    def numbers(self, step: int) -> Batch:
        """The batch of `step` without what a record holds: `index` and `extra`."""
        index = self.indices(step)[self._first : self._last]
        if self._extra is None:
            return {"index": index}
        return {"index": index, **self._extra(step // self.steps_per_epoch, index)}

    def indices(self, step: int) -> np.ndarray:
        """Record indices of the global batch of `step`, all processes together.

        Raises:
          IndexError: `step` is not in `range(len(self))`.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is not in range({len(self)})")
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self._batch_size
        return self._epoch_order(epoch)[start : start + self._batch_size]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        # Threads may race here; each then computes the same array.
        order = self._order
        if order is None or order[0] != epoch:
            rng = np.random.default_rng((self._seed, epoch))
            order = (epoch, rng.permutation(len(self._source)).astype(np.int32))
            self._order = order
        return order[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_order": None}


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    epochs: int,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    extra: Extra | None = None,
) -> TrainBatches:
    """Training batches in a fresh order for each epoch.

    We draw the order with numpy: grain's own shuffle seeds epoch e of seed s like
    epoch 0 of seed s + e, and keeps neighbours together more often than chance.

    Args:
      source: the records.
      batch_size: global, over all processes.
      seed: with the number of the epoch, the only thing the order depends on.
      epochs: how many epochs to deliver.
      workers: processes that read; 0 reads in threads of this process. Programs that
        use workers need the `if __name__ == "__main__"` guard.
      process_index: which process this is.
      process_count: how many processes share each global batch; process p delivers
        rows `p * batch_size / process_count` and following.
      extra: adds entries that the records themselves do not have, such as stored
        teacher targets; must survive pickling.

    Returns:
      An object with `steps_per_epoch` whose iterators yield `image` `[b, h, w, c]`,
      `label` int32 `[b]` or `[b, h, w]`, and `index` int32 `[b]`, with
      `b = batch_size / process_count`. Iterators are grain iterators: `get_state` and
      `set_state` resume exactly, also with another number of workers, and they can be
      given to `grain.checkpoint.CheckpointSave` and `CheckpointRestore`. Close them
      after use.

    Raises:
      ValueError: an argument is impossible, or there are fewer records than one batch.
    """
    return TrainBatches(
        source,
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
        workers=workers,
        process_index=process_index,
        process_count=process_count,
        extra=extra,
    )


class Stacked:
    """The batches of several runs side by side: every entry `[runs, b, ...]`.

    Args:
      batches: those of each run, equally many.
    """

    def __init__(self, batches: Sequence[TrainBatches]):
        self._batches = tuple(batches)
        self.workers = self._batches[0].workers

    def __len__(self) -> int:
        return len(self._batches[0])

    def __getitem__(self, step: int) -> Batch:
        return _side_by_side([batches[step] for batches in self._batches])

    def __iter__(self) -> BatchIterator:
        from jaxkd.data._iterator import BatchIterator

        return BatchIterator(self, workers=self.workers)

    def numbers(self, step: int) -> Batch:
        """As `TrainBatches.numbers`."""
        return _side_by_side([batches.numbers(step) for batches in self._batches])


def _side_by_side(parts: list[Batch]) -> Batch:
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


class Numbers:
    """Batches without what the records hold, for records that lie on the devices.

    Args:
      batches: the batches.
    """

    def __init__(self, batches: TrainBatches | Stacked):
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Batch:
        return self._batches.numbers(step)

    def __iter__(self) -> BatchIterator:
        from jaxkd.data._iterator import BatchIterator

        return BatchIterator(self, workers=0)


class WithUnlabelled:
    """Training batches that also carry unlabelled images.

    Each batch has `unlabelled_image` and `unlabelled_index` beside its own entries.
    Both sets go round as often as the steps need.

    Args:
      labelled: batches of the labelled records.
      unlabelled: batches of the others, as many or more.
      steps: how many batches there are.
    """

    def __init__(self, labelled: TrainBatches, unlabelled: TrainBatches, steps: int):
        if min(len(labelled), len(unlabelled)) < steps:
            raise ValueError(
                f"{steps} steps wanted, but there are {len(labelled)} labelled and "
                f"{len(unlabelled)} unlabelled batches"
            )
        self._labelled, self._unlabelled, self._steps = labelled, unlabelled, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        other = self._unlabelled[step]
        return {
            **self._labelled[step],
            "unlabelled_image": other["image"],
            "unlabelled_index": other["index"],
        }

    def __iter__(self) -> BatchIterator:
        from jaxkd.data._iterator import BatchIterator

        return BatchIterator(self, workers=self._labelled.workers)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every record once, in order, in batches of one shape.

    Args:
      source: the records.
      batch_size: global, over all processes.
      workers: processes that read; 0 reads in threads of this process.
      process_index: which process this is.
      process_count: how many processes share each global batch.

    Yields:
      Batches as from `train_batches`, and `valid` bool `[b]`: False for the rows that
      fill up the last batch with copies of the last record. All processes yield
      equally many batches.

    Raises:
      ValueError: an argument is impossible, or there are no records.
    """
    batches = _EvalBatches(
        source,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )
    return _read_through(batches, workers)


def _read_through(batches: _EvalBatches, workers: int) -> Iterator[Batch]:
    from jaxkd.data._iterator import BatchIterator

    iterator = BatchIterator(batches, workers=workers)
    try:
        yield from iterator
    finally:
        iterator.close()


class _EvalBatches:
    def __init__(
        self, source: Source, *, batch_size: int, process_index: int, process_count: int
    ):
        self._first, self._last = _process_rows(
            batch_size, process_index, process_count
        )
        if not len(source):
            raise ValueError("the data set has no records to evaluate")
        self._source = source
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._source) // self._batch_size)

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is not in range({len(self)})")
        start = step * self._batch_size
        rows = np.arange(start + self._first, start + self._last, dtype=np.int32)
        valid = rows < len(self._source)
        batch = read_records(self._source, np.minimum(rows, len(self._source) - 1))
        return {**batch, "valid": valid}


def _process_rows(
    batch_size: int, process_index: int, process_count: int
) -> tuple[int, int]:
    """First and last row of a global batch that this process delivers."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index {process_index} is not in range({process_count})"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by {process_count} processes"
        )
    rows = batch_size // process_count
    return process_index * rows, (process_index + 1) * rows


def read_records(source: Source, indices: np.ndarray) -> Batch:
    """Reads and stacks records; each record is read once even if it repeats.

    Args:
      source: the records.
      indices: their numbers, integer `[b]`.

    Returns:
      The entries of the records stacked, `label` int32, and `index` int32 `[b]`.

    Raises:
      ValueError: records differ in shape.
    """
    take = getattr(source, "take", None)
    unique, inverse = np.unique(indices, return_inverse=True)
    if take is not None:
        batch = take(unique)
    else:
        records = [source[int(i)] for i in unique]
        batch = {
            name: _stack(name, [record[name] for record in records], unique)
            for name in records[0]
        }
    batch = {name: values[inverse] for name, values in batch.items()}
    return {
        **batch,
        "label": batch["label"].astype(np.int32),
        "index": indices.astype(np.int32),
    }


def _stack(name: str, values: list[np.ndarray], indices: np.ndarray) -> np.ndarray:
    first = np.shape(values[0])
    for value, index in zip(values, indices, strict=True):
        if np.shape(value) != first:
            raise ValueError(
                f"record {index} has {name} of shape {np.shape(value)} but record "
                f"{indices[0]} has {first}; set image_size on the data source"
            )
    return np.stack(values)
