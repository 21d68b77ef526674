"""The loop of `--mode=label`: records in, packed answers out, until a signal comes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import jax
import numpy as np
from tqdm.auto import tqdm

from jaxkd.data import Source, pipeline
from jaxkd.data.target_writer import TargetsWriter
from jaxkd.training.signals import Stopped, StopSignal

logger = logging.getLogger("jaxkd")

# `ask(batch, view)` is the packed answers to a batch of images, on the devices.
Ask = Callable[[pipeline.Batch, int], Mapping[str, jax.Array]]


class InOrder:
    """Every record in order, once for each view, in batches of one size.

    Args:
      source: the records.
      batch_size: of all batches; the last one of a view is filled up.
      views: how often.
    """

    def __init__(self, source: Source, *, batch_size: int, views: int = 1):
        self._source, self.batch_size = source, batch_size
        self.per_view = -(-len(source) // batch_size)
        self.views = views

    def __len__(self) -> int:
        return self.views * self.per_view

    def rows(self, step: int) -> np.ndarray:
        """The records of a batch; the last batch of a view may be shorter."""
        first = step % self.per_view * self.batch_size
        return np.arange(first, min(first + self.batch_size, len(self._source)))

    def __getitem__(self, step: int) -> pipeline.Batch:
        rows = self.rows(step)
        # Copies of the last record fill up, so that one program serves all.
        filled = np.pad(rows, (0, self.batch_size - len(rows)), mode="edge")
        return pipeline.read_records(self._source, filled.astype(np.int32))


def write_answers(
    writer: TargetsWriter,
    ask: Ask,
    batches: InOrder,
    *,
    records: int,
    stage: str,
    workers: int,
    stop: StopSignal,
    each: int = 1,
) -> None:
    """Writes the answers that a writer does not have yet.

    Args:
      writer: where they go, one row for each view of each record.
      ask: see `Ask`.
      batches: the images.
      records: how many there are.
      stage: for messages.
      workers: processes that read.
      stop: read between batches.
      each: answers in a row, for messages.

    Raises:
      Stopped: a signal came; whole files are kept and not written again.
      ValueError: an answer is not finite in its format.
      OSError: the files cannot be written.
    """
    from jaxkd.data._iterator import BatchIterator

    total = records * batches.views
    view, within = divmod(writer.position, records)
    step = view * batches.per_view + within // batches.batch_size
    skip = within % batches.batch_size
    if writer.position:
        logger.info("%s: %d answers are there", stage, writer.position * each)
    iterator = BatchIterator(batches, workers=workers)
    iterator.set_state({"next_step": step})

    def write(step: int, answer: Mapping[str, jax.Array], skip: int) -> int:
        count = len(batches.rows(step))
        writer.write({k: np.asarray(v)[skip:count] for k, v in answer.items()})
        return (count - skip) * each

    bar = tqdm(
        total=total * each,
        initial=writer.position * each,
        desc=f"{stage}: targets",
        unit="image",
        disable=None,
    )
    try:
        with bar:
            waiting: tuple[int, Mapping[str, jax.Array], int] | None = None
            for number, batch in enumerate(iterator, start=step):
                asked = ask(batch, number // batches.per_view)
                # The devices work on this batch while the one before is written.
                if waiting is not None:
                    bar.update(write(*waiting))
                waiting, skip = (number, asked, skip), 0
                if stop.received:
                    raise Stopped(
                        f"stopped by {stop.received} while labelling for stage "
                        f"{stage!r}, {writer.position * each} of {total * each} "
                        "answers are kept; run the same command again to continue"
                    )
            if waiting is not None:
                bar.update(write(*waiting))
    finally:
        iterator.close()
