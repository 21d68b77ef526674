"""Random access to many ArrayRecord files of which few are open at a time."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A process may often have 1,024 open files, and several folders of targets.
_OPEN_FILES = 64


@dataclasses.dataclass
class _Open:
    """An open file, how many threads read it, and whether the last one closes it."""

    reader: Any
    threads: int = 0
    dropped: bool = False


class Readers:
    """Reads records by file and number; threads may share it.

    The files used last stay open.

    Args:
      limit: files that stay open.

    Raises:
      ValueError: a limit below 1.
    """

    def __init__(self, limit: int = _OPEN_FILES):
        if limit < 1:
            raise ValueError(f"limit must be >= 1, got {limit}")
        self._limit = limit
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[Path, _Open] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def read(self, path: Path, numbers: Sequence[int]) -> list[bytes]:
        """The records `numbers` of a file.

        Raises:
          OSError: the file cannot be opened.
          RuntimeError, IndexError: it holds something else, or cannot be read.
        """
        file = self._take(path)
        try:
            return file.reader.read(list(numbers))
        except BaseException:
            # What failed once must not be used again.
            self._drop(path, file)
            raise
        finally:
            self._give_back(file)

    def close(self) -> None:
        """Closes the files; those that a thread reads, when it is done."""
        with self._lock:
            for path, file in list(self._open.items()):
                self._remove(path, file)

    def _take(self, path: Path) -> _Open:
        with self._lock:
            file = self._open.get(path)
            if file is None:
                # ArrayRecord tells by its first record only that there is no file.
                with open(path, "rb"):
                    pass
                reader = array_record().ArrayRecordReader(
                    str(path), "readahead_buffer_size:0", file_reader_buffer_size=32768
                )
                file = self._open[path] = _Open(reader)
            file.threads += 1
            self._open.move_to_end(path)
            self._shrink()
            return file

    def _give_back(self, file: _Open) -> None:
        with self._lock:
            file.threads -= 1
            if file.dropped and not file.threads:
                file.reader.close()
            self._shrink()

    def _drop(self, path: Path, file: _Open) -> None:
        with self._lock:
            if self._open.get(path) is file:
                self._remove(path, file)

    def _shrink(self) -> None:
        """Closes what nobody reads, the longest unused first."""
        idle = [(path, file) for path, file in self._open.items() if not file.threads]
        for path, file in idle[: max(len(self._open) - self._limit, 0)]:
            self._remove(path, file)

    def _remove(self, path: Path, file: _Open) -> None:
        del self._open[path]
        if file.threads:
            file.dropped = True
        else:
            file.reader.close()


def array_record() -> Any:
    """The module of the file format, which comes with grain.

    Raises:
      ImportError: it is not installed.
    """
    try:
        return importlib.import_module("array_record.python.array_record_module")
    except ImportError as error:
        raise ImportError(
            "stored targets need array_record: pip install array_record"
        ) from error
