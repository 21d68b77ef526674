"""Files and folders that are there whole or not at all, also after a crash.

What is written goes to the disk before it gets its name, and a folder that takes long
to fill has one writer at a time.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
# What file systems answer that know no locks, or cannot sync folders.
_UNKNOWN = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Lets an error while a file is written say so in one line, with its path.

    Raises:
      OSError: instead of the `OSError`, or of the `RuntimeError` of an ArrayRecord
        file, that came.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition(";")[0]
        raise OSError(f"cannot write {path}: {reason}") from error


def sync(path: Path) -> None:
    """Waits until a file, or the list of names of a folder, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _UNKNOWN or not path.is_dir():
            raise
    finally:
        os.close(number)


def put_in_place(unfinished: Path, path: Path) -> None:
    """Gives a finished file, or a folder of synced files, its name.

    Raises:
      OSError: it cannot be written.
    """
    with writing(path):
        sync(unfinished)
        os.replace(unfinished, path)
        sync(path.parent)


class FolderLock:
    """Keeps other processes from writing into a folder, until `release` or exit.

    The lock is one of the operating system on the file `.lock` in the folder: that of
    a process that was killed is free again. On file systems without locks there is a
    warning and no lock.

    Args:
      folder: it must exist.

    Raises:
      BlockingIOError: another writer has it.
      OSError: the file cannot be made.
    """

    def __init__(self, folder: Path):
        import fcntl  # which only POSIX systems have

        path = folder / LOCK
        with writing(path):
            number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._close = weakref.finalize(self, os.close, number)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise BlockingIOError(
                f"another process is writing {folder}; wait until it ends, or stop it"
            ) from None
        except OSError as error:
            if error.errno not in _UNKNOWN:
                self._close()
                raise
            _log.warning(
                "%s cannot be locked (%s): let no other process write there",
                folder,
                error.strerror,
            )

    def release(self) -> None:
        """Lets others write."""
        self._close()
