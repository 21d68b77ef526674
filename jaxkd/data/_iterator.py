"""The grain side of the pipeline; imported only when a pipeline is started."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

Batch = dict[str, np.ndarray]


class BatchIterator(grain.DatasetIterator):
    """Iterates over a random-access sequence of batches, in order.

    Its state is the number of batches taken, whatever the number of workers: a run may
    resume with more or fewer of them, which grain's own state does not allow.

    Args:
      batches: anything with `__len__` and `__getitem__`, picklable for workers.
      workers: number of worker processes; 0 reads in threads of this process.
    """

    def __init__(self, batches: Any, *, workers: int):
        super().__init__()
        self._batches = batches
        self._workers = workers
        self._next_step = 0
        self._inner: grain.DatasetIterator | None = None
        self._ended = False

    def __next__(self) -> Batch:
        if self._ended:
            raise ValueError("this iterator was closed; start a new one with iter()")
        if self._next_step >= len(self._batches):
            raise StopIteration
        if self._inner is None and self._workers:
            with _signals_held():
                batch = next(self._start())
        else:
            batch = next(self._start())
        self._next_step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position as plain JSON."""
        return {"next_step": self._next_step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the position of `state`; the next batch is the one after it.

        Raises:
          ValueError: the state lies beyond the end of the data.
        """
        step = int(state["next_step"])
        if not 0 <= step <= len(self._batches):
            raise ValueError(
                f"the saved data position is step {step} but there are only "
                f"{len(self._batches)} steps; was the number of epochs, the batch "
                "size or the data set changed?"
            )
        self._stop()
        self._next_step = step

    def start_prefetch(self) -> None:
        """Begins to read ahead in the background."""
        if self._next_step < len(self._batches):
            with _signals_held():
                self._start().start_prefetch()

    def close(self) -> None:
        """Ends threads and worker processes."""
        self._stop()
        self._ended = True
        super().close()

    def __str__(self) -> str:
        return f"BatchIterator(workers={self._workers}, next_step={self._next_step})"

    def _start(self) -> grain.DatasetIterator:
        if self._inner is None:
            dataset = grain.MapDataset.source(self._batches)[self._next_step :]
            # Elements are whole batches: a few read ahead are plenty.
            dataset = dataset.to_iter_dataset(
                grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
            )
            if self._workers:
                _mark_flags_parsed()
                dataset = dataset.mp_prefetch(
                    grain.MultiprocessingOptions(
                        num_workers=self._workers, per_worker_buffer_size=2
                    ),
                    worker_init_fn=_ignore_signals,
                )
            self._inner = iter(dataset)
        return self._inner

    def _stop(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None


_STOPPING = {signal.SIGINT, signal.SIGTERM}


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Holds back what would end a process.

    Workers that start within it hold it back as well until they ignore it. One that
    ended before would leave this process waiting for a reader of what it sends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(worker: int, workers: int) -> None:
    """Lets the parent decide what a signal to the whole process group means."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


def _mark_flags_parsed() -> None:
    """Lets grain read its absl flags in programs that are not absl apps."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
