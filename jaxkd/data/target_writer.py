"""Writes a folder of stored teacher targets; see `jaxkd.data.targets`.

Everything goes into a folder `<name>.part`, which gets its name when nothing is
missing. A writer that was killed goes on after its last whole file.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxkd.data.source import DamagedFileError
from jaxkd.data.targets import (
    CONSTANTS,
    MANIFEST,
    Manifest,
    Shard,
    Targets,
    array_record,
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
      path: the folder; there must be none yet.
      manifest: what it will hold; without files.
      shard_bytes: size of a file, more or less.

    Attributes:
      position: records in the files that are finished; a writer that was killed left
        those, and its successor goes on from there.
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
        self._begin()

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
        """
        rows = join_rows(packed, self._manifest.fields)
        if self.position + self._in_shard + len(rows) > self._total:
            raise ValueError(f"there are more than {self._total} records")
        for row in rows:
            if self._writer is None:
                unfinished = self._part / f"{self._name(len(self._shards))}.part"
                group = max(1, _GROUP_BYTES // self._manifest.record_bytes)
                self._writer = array_record().ArrayRecordWriter(
                    str(unfinished), f"group_size:{group},uncompressed"
                )
            self._writer.write(row.tobytes())
            self._in_shard += 1
            if self._in_shard == self._per_shard:
                self._finish_shard()

    def finish(self, constants: Mapping[str, np.ndarray]) -> Targets:
        """Writes the rest and the manifest, and gives the folder its name.

        Args:
          constants: what is the same for all records.

        Raises:
          ValueError: records are missing.
        """
        if self._in_shard:
            self._finish_shard()
        if self.position != self._total:
            raise ValueError(f"{self.position} of {self._total} records were written")
        file = None
        if constants:
            arrays: dict[str, Any] = dict(constants)
            np.savez(self._part / CONSTANTS, **arrays)
            file = describe_file(self._part / CONSTANTS, 0)
        manifest = dataclasses.replace(
            self._manifest, shards=tuple(self._shards), constants=file
        )
        write_manifest(self._part, manifest)
        if self._path.is_dir():
            self._path.rmdir()  # an empty one; others were refused
        self._part.rename(self._path)
        return open_targets(self._path)

    def close(self) -> None:
        """Ends; what is not in a finished file is written again next time."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _begin(self) -> None:
        if self._path.exists() and (
            not self._path.is_dir() or any(self._path.iterdir())
        ):
            raise FileExistsError(f"{self._path} is there already and not empty")
        if not self._resume():
            shutil.rmtree(self._part, ignore_errors=True)
            self._part.mkdir(parents=True)
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
            if _records_in(path) != records:
                self._shards = []
                return False
            self._shards.append(describe_file(path, records))
        for path in self._part.glob("*.part"):
            path.unlink()
        return True

    def _name(self, number: int) -> str:
        return f"targets-{number:05d}-of-{self._count:05d}.array_record"

    def _finish_shard(self) -> None:
        self._writer.close()
        self._writer = None
        path = self._part / self._name(len(self._shards))
        path.with_name(f"{path.name}.part").rename(path)
        self._shards.append(describe_file(path, self._in_shard))
        self._in_shard = 0


def _records_in(path: Path) -> int | None:
    """How many records a file has; None if it cannot be read."""
    try:
        reader = array_record().ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError, OSError):
        return None
    return count
