"""Writes a folder of stored teacher targets; see `jaxkd.data.targets`.

Everything goes into a folder `<name>.part`, which gets its name when nothing is
missing. A writer that was killed goes on after its last whole file. A folder has one
writer at a time.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxkd.data.durable import LOCK, FolderLock, put_in_place, sync, writing
from jaxkd.data.source import DamagedFileError
from jaxkd.data.target_readers import array_record
from jaxkd.data.targets import (
    CONSTANTS,
    MANIFEST,
    Manifest,
    Shard,
    Targets,
    describe_file,
    join_rows,
    open_targets,
    read_manifest,
    write_manifest,
)

# Records are read in groups of about this size; each group costs some 50 bytes.
_GROUP_BYTES = 4096


class TargetsWriter:
    """Writes a folder of targets, whole or not at all.

    Args:
      path: the folder; there must be none yet, or an empty one.
      manifest: what it will hold; without files.
      shard_bytes: size of a file, more or less.

    Attributes:
      position: records in the files that are finished; a writer that was killed left
        those, and its successor goes on from there.

    Raises:
      FileExistsError: there is something at `path`.
      BlockingIOError: another process is writing this folder.
      OSError: the folder cannot be written.
    """

    def __init__(self, path: Path, manifest: Manifest, *, shard_bytes: int):
        self._path, self._manifest = path, manifest
        self._part = path.with_name(path.name + ".part")
        self._total = manifest.records * manifest.views
        self._per_shard = max(1, shard_bytes // manifest.record_bytes)
        self._count = -(-self._total // self._per_shard)
        self._shards: list[Shard] = []
        self._writer: Any = None
        self._in_shard = 0
        self._check_path()
        with writing(self._part):
            self._part.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self._part)
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise

    @property
    def position(self) -> int:
        """See the class."""
        return sum(shard.records for shard in self._shards)

    def write(self, packed: Mapping[str, np.ndarray]) -> None:
        """Appends records.

        Args:
          packed: the arrays of `manifest.fields`, each `[b, ...]`.

        Raises:
          ValueError: a number is infinite or NaN, or there are too many records.
          OSError: the file cannot be written; what is finished stays.
        """
        rows = join_rows(packed, self._manifest.fields)
        if self.position + self._in_shard + len(rows) > self._total:
            raise ValueError(f"there are more than {self._total} records")
        for row in rows:
            self._append(row.tobytes())
            if self._in_shard == self._per_shard:
                self._finish_shard()

    def finish(self, constants: Mapping[str, np.ndarray]) -> Targets:
        """Writes the rest and the manifest, and gives the folder its name.

        Args:
          constants: what is the same for all records.

        Raises:
          ValueError: records are missing.
        """
        self._complete()
        file = None
        if constants:
            arrays: dict[str, Any] = dict(constants)
            path = self._part / CONSTANTS
            with writing(path):
                np.savez(path, **arrays)
                sync(path)
            file = describe_file(path, 0)
        self._publish(
            dataclasses.replace(
                self._manifest, shards=tuple(self._shards), constants=file
            )
        )
        return open_targets(self._path)

    def export(
        self, name: str, manifest: Manifest, write: Callable[[Path, Targets], None]
    ) -> None:
        """Ends as `finish` does, with one file of another format for the records.

        Args:
          name: of the file.
          manifest: what the folder will hold; without files.
          write: `write(path, targets)` writes the file from all records.

        Raises:
          ValueError: records are missing.
          OSError: the file cannot be written.
        """
        self._complete()
        path = self._part / name
        unfinished = path.with_name(f"{name}.part")
        shards = tuple(self._shards)
        targets = Targets(
            self._part, dataclasses.replace(self._manifest, shards=shards)
        )
        try:
            with writing(path):
                write(unfinished, targets)
        finally:
            targets.close()
        put_in_place(unfinished, path)
        file = describe_file(path, manifest.records * manifest.views)
        self._publish(dataclasses.replace(manifest, shards=(file,)))
        _keep_only(self._path, {MANIFEST, name})

    def close(self) -> None:
        """Ends; what is not in a finished file is written again next time.

        Raises:
          OSError: the file cannot be written.
        """
        try:
            self._close_file()
        finally:
            self._lock.release()

    def _check_path(self) -> None:
        if self._path.exists() and (
            not self._path.is_dir() or any(self._path.iterdir())
        ):
            raise FileExistsError(f"{self._path} is there already and not empty")

    def _begin(self) -> None:
        self._check_path()  # again: who had the lock may have finished
        if not self._resume():
            self._shards = []
            _keep_only(self._part, {LOCK})
            write_manifest(self._part, self._manifest)

    def _resume(self) -> bool:
        """Takes over the finished files of a writer of the same manifest."""
        try:
            before = read_manifest(self._part / MANIFEST)
        except (FileNotFoundError, DamagedFileError):
            return False
        before = dataclasses.replace(before, shards=(), constants=None)
        if before.to_json() != json.loads(json.dumps(self._manifest.to_json())):
            return False
        for number in range(self._count):
            path = self._part / self._name(number)
            if not path.exists():
                break
            left = self._total - number * self._per_shard
            records = min(self._per_shard, left)
            shard = describe_file(path, records)
            if _records_in(path) != records:
                return False
            self._shards.append(shard)
        # Others are of a file that was begun, or of another size of files.
        known = {shard.name for shard in self._shards}
        _keep_only(self._part, {LOCK, MANIFEST, *known})
        return True

    def _name(self, number: int) -> str:
        return f"targets-{number:05d}-of-{self._count:05d}.array_record"

    def _append(self, record: bytes) -> None:
        path = self._part / self._name(len(self._shards))
        try:
            with writing(path):
                if self._writer is None:
                    group = max(1, _GROUP_BYTES // self._manifest.record_bytes)
                    self._writer = array_record().ArrayRecordWriter(
                        f"{path}.part", f"group_size:{group},uncompressed"
                    )
                self._writer.write(record)
        except OSError:
            # Closing what cannot be written would fail in the same way.
            self._writer, self._in_shard = None, 0
            raise
        self._in_shard += 1

    def _close_file(self) -> None:
        writer, self._writer, self._in_shard = self._writer, None, 0
        if writer is not None:
            with writing(self._part / self._name(len(self._shards))):
                writer.close()

    def _finish_shard(self) -> None:
        path, records = self._part / self._name(len(self._shards)), self._in_shard
        self._close_file()
        put_in_place(path.with_name(f"{path.name}.part"), path)
        self._shards.append(describe_file(path, records))

    def _complete(self) -> None:
        if self._in_shard:
            self._finish_shard()
        if self.position != self._total:
            raise ValueError(f"{self.position} of {self._total} records were written")

    def _publish(self, manifest: Manifest) -> None:
        write_manifest(self._part, manifest)
        with writing(self._path):
            if self._path.is_dir():
                self._path.rmdir()  # an empty one; others were refused
        put_in_place(self._part, self._path)
        (self._path / LOCK).unlink()
        self._lock.release()


def _keep_only(folder: Path, names: Collection[str]) -> None:
    """Deletes whatever else is in a folder."""
    for path in folder.iterdir():
        if path.name in names:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _records_in(path: Path) -> int | None:
    """How many records a file has; None if it is damaged."""
    try:
        reader = array_record().ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError):
        return None
    return count
