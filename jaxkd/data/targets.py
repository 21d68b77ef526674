"""Stored teacher targets: a folder of ArrayRecord files and a manifest.

There is one record for each view of each training record, views one after the other:
position `view * records + index`. A record is the concatenation of its packed arrays
(`jaxkd.data.target_codecs`), little-endian and without padding, in the order and with
the dtypes and shapes that the manifest names; nothing is pickled. What is the same for
all records, such as a teacher's last layer, is in `constants.npz`.

Here is what such a folder is and how it is read; `jaxkd.data.target_writer` writes it.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxkd.data.durable import put_in_place, writing
from jaxkd.data.fingerprint import file_fingerprint, source_fingerprint
from jaxkd.data.source import DamagedFileError, Source
from jaxkd.data.target_codecs import Field
from jaxkd.data.target_readers import Readers

FORMAT_VERSION = 1
MANIFEST, CONSTANTS = "manifest.json", "constants.npz"
# Targets up to this size are read into memory once.
_IN_MEMORY_BYTES = 2**28
REMEDY = "delete the folder and write the targets anew with --mode=label"

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: its name, number of records, bytes and SHA-256."""

    name: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of targets holds, and for whom.

    Attributes:
      identity: everything that the targets depend on, as plain JSON: they serve where
        all of it is the same.
      records: training records.
      views: stored views of each.
      fields: the packed arrays of one record, in order.
      shards: the files, in order; all but the last have equally many records.
      constants: the file of what is the same for all records.
      format_version: of this description.
    """

    identity: Mapping[str, Any]
    records: int
    views: int
    fields: Mapping[str, Field]
    shards: tuple[Shard, ...] = ()
    constants: Shard | None = None
    format_version: int = FORMAT_VERSION

    @property
    def record_bytes(self) -> int:
        """Bytes of one stored record."""
        return sum(field.nbytes for field in self.fields.values())

    @property
    def files(self) -> tuple[Shard, ...]:
        """All files but the manifest."""
        return (*self.shards, *([self.constants] if self.constants else []))

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        fields = {
            name: {"dtype": field.dtype, "shape": list(field.shape)}
            for name, field in self.fields.items()
        }
        constants = None if self.constants is None else vars(self.constants)
        return {
            "format_version": self.format_version,
            "identity": dict(self.identity),
            "records": self.records,
            "views": self.views,
            "record_bytes": self.record_bytes,
            "fields": fields,
            "shards": [vars(shard) for shard in self.shards],
            "constants": constants,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """From plain JSON.

        Raises:
          ValueError, KeyError, TypeError: it is no manifest of this version.
        """
        version = value["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format_version is {version}, and this code reads {FORMAT_VERSION}"
            )
        fields = {
            name: Field(np.dtype(field["dtype"]).name, tuple(map(int, field["shape"])))
            for name, field in value["fields"].items()
        }
        constants = value["constants"]
        return cls(
            identity=dict(value["identity"]),
            records=int(value["records"]),
            views=int(value["views"]),
            fields=fields,
            shards=tuple(Shard(**shard) for shard in value["shards"]),
            constants=None if constants is None else Shard(**constants),
        )


class Targets:
    """Reads stored targets; see `open_targets`.

    `targets(epoch, indices)` are the packed arrays of the view that an epoch shows, as
    `pipeline.train_batches` takes them for `extra`. Small sets are read into memory as
    a whole, by the first read. Copies of a pickled object, which the reader processes
    of a pipeline have, open the files anew and read record by record.

    Attributes:
      path: the folder.
      manifest: what it holds.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self._in_memory = manifest.nbytes <= _IN_MEMORY_BYTES
        self._lock = threading.Lock()
        self._readers = Readers()
        self._rows: np.ndarray | None = None

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        """The packed arrays of records in an epoch, each `[b, ...]`."""
        return self.read(epoch % self.manifest.views, indices)

    def read(self, view: int, indices: np.ndarray) -> Batch:
        """The packed arrays of one view of records, each `[b, ...]`.

        Raises:
          IndexError: there is no such view or record.
          DamagedFileError: a file is damaged.
          OSError: a file cannot be read, and is not known to be damaged.
        """
        manifest, indices = self.manifest, np.asarray(indices, np.int64)
        if not 0 <= view < manifest.views:
            raise IndexError(f"view {view} is not in range({manifest.views})")
        if indices.size and not 0 <= indices.min() <= indices.max() < manifest.records:
            raise IndexError(
                f"records {indices.min()} to {indices.max()} are not in "
                f"range({manifest.records})"
            )
        positions = view * manifest.records + indices
        if self._in_memory:
            return split_rows(self._all()[positions], manifest.fields)
        rows = np.empty((len(indices), manifest.record_bytes), np.uint8)
        shards, offsets = np.divmod(positions, manifest.shards[0].records)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            rows[here] = self._read(int(shard), offsets[here])
        return split_rows(rows, manifest.fields)

    def constants(self) -> dict[str, np.ndarray]:
        """What is the same for all records, by name.

        Raises:
          DamagedFileError: the file is damaged.
        """
        file = self.manifest.constants
        if file is None:
            return {}
        path = self._check_file(file)
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)

    def check_files(self) -> None:
        """Compares the SHA-256 of every file with the manifest's.

        Raises:
          DamagedFileError: one differs.
        """
        for file in self.manifest.files:
            self._check_file(file)

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        self._readers.close()

    def _check_file(self, file: Shard) -> Path:
        path = self.path / file.name
        if file_fingerprint(path) != file.sha256:
            raise DamagedFileError(path, "its SHA-256 is not the manifest's", REMEDY)
        return path

    def _all(self) -> np.ndarray:
        """All records; threads that come together read them once."""
        with self._lock:
            if self._rows is None:
                parts = [
                    self._read(number, np.arange(shard.records))
                    for number, shard in enumerate(self.manifest.shards)
                ]
                self._rows = np.concatenate(parts)
                self.close()
            return self._rows

    def _read(self, number: int, offsets: np.ndarray) -> np.ndarray:
        shard = self.manifest.shards[number]
        path = self.path / shard.name
        try:
            values = self._readers.read(path, offsets.tolist())
        except (RuntimeError, IndexError) as error:
            # The file, or the device that it is on: its bytes tell, if they are read.
            self._check_file(shard)
            reason = str(error).partition(";")[0]
            raise OSError(f"cannot read {path}: {reason}") from error
        data = np.frombuffer(b"".join(values), np.uint8)
        expected = (len(offsets), self.manifest.record_bytes)
        if data.size != np.prod(expected):
            raise DamagedFileError(
                path,
                f"{len(offsets)} records have {data.size} bytes and should have "
                f"{expected[1]} each",
                REMEDY,
            )
        return data.reshape(expected)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)
        self._in_memory = False


def open_targets(path: Path) -> Targets:
    """Opens a folder of targets and checks that its files are there in full length.

    What the files hold is checked by their format's own checksums when records are
    read, and in full by `Targets.check_files`.

    Raises:
      FileNotFoundError: there is no manifest.
      DamagedFileError: the manifest or a file is damaged.
      OSError: one cannot be read.
    """
    manifest = read_manifest(path / MANIFEST)
    if not manifest.shards:
        raise DamagedFileError(
            path / MANIFEST, "it names no files: they were never finished", REMEDY
        )
    for file in manifest.files:
        at = path / file.name
        if not at.exists():
            raise DamagedFileError(at, "it is missing", REMEDY)
        if at.stat().st_size != file.bytes:
            raise DamagedFileError(
                at,
                f"it has {at.stat().st_size} bytes and should have {file.bytes}",
                REMEDY,
            )
    return Targets(path, manifest)


def read_manifest(path: Path) -> Manifest:
    """Reads a manifest.

    Raises:
      FileNotFoundError: there is none.
      OSError: it cannot be read.
      DamagedFileError: it is damaged, or contradicts itself.
    """
    try:
        manifest = Manifest.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(path, repr(error), REMEDY) from error
    stored = sum(shard.records for shard in manifest.shards)
    if manifest.shards and stored != manifest.records * manifest.views:
        raise DamagedFileError(
            path,
            f"its files have {stored} records, but {manifest.views} views of "
            f"{manifest.records} records are {manifest.views * manifest.records}",
            REMEDY,
        )
    return manifest


def check_data(file: Path, source: Source) -> None:
    """Checks that labels belong to a source, if a manifest beside them tells.

    Args:
      file: the labels.
      source: the records they are to be used for.

    Raises:
      ValueError: they belong to other records.
      DamagedFileError: the manifest is damaged.
    """
    stored = _identity_of(file).get("data")
    if stored is None:
        return
    found = source_fingerprint(source)
    differ = [name for name in found if found[name] != stored.get(name)]
    if differ:
        raise ValueError(
            f"the labels of {file} are those of other records: {differ[0]} is "
            f"{stored.get(differ[0])!r} there and {found[differ[0]]!r} here; write "
            "them anew with --mode=label, or restore the data"
        )


def check_crop_box(file: Path, crop_box: Sequence[int] | None) -> None:
    """Checks that labels of crops are of what a student is shown of them.

    A crop box is cut from crops as it is from whole images. The manifest beside the
    labels tells which one the teacher saw; without a manifest nothing is known.

    Args:
      file: the labels.
      crop_box: the student's, see `Augmentation.crop_box`.

    Raises:
      ValueError: the teacher saw another part of the crops.
      DamagedFileError: the manifest is damaged.
    """
    augment = _identity_of(file).get("augment", {})
    if "crop_box" not in augment:
        return
    stored = augment["crop_box"] and tuple(augment["crop_box"])
    if stored != (crop_box and tuple(crop_box)):
        raise ValueError(
            f"crop_box is {crop_box}, and the labels of {file} are those of crops with "
            f"crop_box {stored}; set it to that, or write them anew with --mode=label"
        )


def _identity_of(file: Path) -> Mapping[str, Any]:
    """What a manifest beside labels tells of them; nothing if there is none."""
    path = file.with_name(MANIFEST)
    if not path.exists():
        return {}
    manifest = read_manifest(path)
    named = file.name in {shard.name for shard in manifest.shards}
    return manifest.identity if named else {}


def join_rows(
    packed: Mapping[str, np.ndarray], fields: Mapping[str, Field]
) -> np.ndarray:
    """The bytes of records, uint8 `[b, record_bytes]`.

    Raises:
      ValueError: a number is infinite or NaN.
    """
    columns = []
    for name, field in fields.items():
        values = np.asarray(packed[name])
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            option = "taps_dtype" if "/taps/" in name else "dtype"
            wider = f"; {option} float32 holds larger numbers than float16"
            raise ValueError(
                f"{name} has numbers that are not finite in {field.dtype}; is the "
                f"teacher trained?{wider if field.dtype == 'float16' else ''}"
            )
        little = np.ascontiguousarray(values, np.dtype(field.dtype).newbyteorder("<"))
        columns.append(little.reshape(len(values), -1).view(np.uint8))
    return np.concatenate(columns, axis=1)


def split_rows(rows: np.ndarray, fields: Mapping[str, Field]) -> Batch:
    """What `join_rows` joined."""
    packed, start = {}, 0
    for name, field in fields.items():
        end = start + field.nbytes
        little = np.ascontiguousarray(rows[:, start:end]).view(
            np.dtype(field.dtype).newbyteorder("<")
        )
        values = little.reshape(len(rows), *field.shape)
        packed[name] = values.astype(field.dtype, copy=False)
        start = end
    return packed


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of a folder, whole or not at all."""
    text = json.dumps(manifest.to_json(), indent=2, allow_nan=False)
    unfinished = folder / f"{MANIFEST}.part"
    with writing(folder / MANIFEST):
        unfinished.write_text(text + "\n", encoding="utf-8")
    put_in_place(unfinished, folder / MANIFEST)


def describe_file(path: Path, records: int) -> Shard:
    """What a manifest says of a file with so many records."""
    return Shard(path.name, records, path.stat().st_size, file_fingerprint(path))
