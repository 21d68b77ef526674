"""Stored regions: crops of every image with the soft labels that a teacher gave them.

`jaxkd.data.region_answers` asks the teacher. Here, `write_regions`, `stream_regions`
and `read_regions` are the file, `with_regions` adds them to the records of a source,
and `choose_regions` turns a batch of whole images into one of crops with soft labels,
on the device. Both sides cut by `jaxkd.data.crops`.

Reference: Shen, Xing, "A Fast Knowledge Distillation Framework for Visual Recognition",
ECCV 2022.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.data.augment import Augmentation
from jaxkd.data.crops import crop_and_flip
from jaxkd.data.durable import put_in_place, writing
from jaxkd.data.source import (
    DamagedFileError,
    Record,
    Source,
    SourceInfo,
    read_labels,
    require_path,
)
from jaxkd.data.target_codecs import Field
from jaxkd.numerics import kept_classes, recover_labels

# Sets the draw of regions apart from other draws of the same record and epoch.
_STREAM = 0x5E61
_REMEDY = "write the labels anew, or restore the file"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regions:
    """Crops of every record of a data set and their compressed soft labels.

    Attributes:
      coords: `(top, left, height, width)` as fractions of the image, float
        `[records, regions, 4]`.
      flip: whether the crop is then mirrored left-right, bool `[records, regions]`.
      index: the classes kept of each soft label, int32 `[records, regions, k]`.
      probability: theirs, float32 or float16, of the same shape.
      label_format: see `jaxkd.numerics.compressed_labels`.
      num_classes: of the soft labels.
      image_shape: `(height, width, channels)` of the images that were cropped.

    Raises:
      ValueError: arrays disagree, or a value is impossible.
    """

    coords: np.ndarray
    flip: np.ndarray
    index: np.ndarray
    probability: np.ndarray
    label_format: str
    num_classes: int
    image_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        kept = kept_classes(self.label_format, self.num_classes)
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(f"image_shape is {self.image_shape}")
        shape = self.coords.shape[:2]
        for name, kind, expected in (
            ("coords", "f", (*shape, 4)),
            ("flip", "b", shape),
            ("index", "iu", (*shape, kept)),
            ("probability", "f", (*shape, kept)),
        ):
            array = getattr(self, name)
            if array.dtype.kind not in kind:
                raise ValueError(f"{name} has dtype {array.dtype}")
            if array.shape != expected or min(shape) < 1:
                raise ValueError(
                    f"{name} has shape {array.shape}; coords {self.coords.shape} and "
                    f"label_format {self.label_format!r} need {expected}"
                )
        corner, size = self.coords[..., :2], self.coords[..., 2:]
        # Comparisons that NaN fails; half precision may round a sum up a little.
        inside = (corner >= 0) & (size > 0) & (corner + size <= 1.001)
        if not inside.all():
            raise ValueError("coords has boxes that are empty or reach outside [0, 1]")
        if self.index.min() < 0 or self.index.max() >= self.num_classes:
            raise ValueError(
                f"index runs from {self.index.min()} to {self.index.max()} but there "
                f"are {self.num_classes} classes"
            )
        if not ((self.probability >= 0) & (self.probability <= 1.001)).all():
            raise ValueError("probability has values outside [0, 1]")


def write_regions(path: str | Path, regions: Regions) -> None:
    """Writes a `.npz` file, whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    with writing(path), open(unfinished, "wb") as file:
        np.savez(file, **vars(regions))
    put_in_place(unfinished, path)


def region_fields(
    regions: int, label_format: str, num_classes: int
) -> dict[str, Field]:
    """The arrays of one record, by their names in `Regions`.

    Raises:
      ValueError: no such format, or too few classes for it.
    """
    kept = kept_classes(label_format, num_classes)
    return {
        "coords": Field("float32", (regions, 4)),
        "flip": Field("bool", (regions,)),
        "index": Field("int32", (regions, kept)),
        "probability": Field("float32", (regions, kept)),
    }


def stream_regions(
    path: Path,
    read: Callable[[int, int], Mapping[str, np.ndarray]],
    *,
    records: int,
    fields: Mapping[str, Field],
    constants: Mapping[str, Any],
    rows: int = 1024,
) -> None:
    """Writes what `write_regions` writes, of which only a part is ever in memory.

    Args:
      path: of the file; written in place.
      read: `read(first, last)` returns the arrays of these records; asked once for
        each array.
      records: of the data set.
      fields: see `region_fields`.
      constants: the other attributes of `Regions`.
      rows: records in memory at a time.
    """
    # Members of a zip file without compression, as numpy.savez writes them.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, field in fields.items():
            dtype = np.dtype(field.dtype).newbyteorder("<")
            header = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": (records, *field.shape),
            }
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for first in range(0, records, rows):
                    values = read(first, min(first + rows, records))[name]
                    file.write(np.ascontiguousarray(values, dtype).tobytes())
        for name, value in constants.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(value), allow_pickle=False)


def read_regions(path: str | Path) -> Regions:
    """Reads and checks what `write_regions` wrote; object arrays are refused.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      DamagedFileError: the file is no `.npz`, lacks an array, or holds impossible
        values.
    """
    path = require_path(path, "regions")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        reason = f"not a readable .npz file ({error})"
        raise DamagedFileError(path, reason, _REMEDY) from error
    fields = [field.name for field in dataclasses.fields(Regions)]
    if missing := [name for name in fields if name not in arrays]:
        raise DamagedFileError(path, f"it has no array {missing[0]!r}", _REMEDY)
    try:
        return Regions(
            **{name: arrays[name] for name in fields[:4]},
            label_format=str(arrays["label_format"]),
            num_classes=int(arrays["num_classes"]),
            image_shape=tuple(arrays["image_shape"].tolist()),
        )
    except (ValueError, TypeError) as error:
        raise DamagedFileError(path, str(error), _REMEDY) from error


class RegionSource:
    """A classification source whose records also carry their stored regions.

    Adds to each record `region_box` float32 `[regions, 4]`, `region_flip` bool
    `[regions]`, `region_index` int32 `[regions, k]` and `region_probability`
    `[regions, k]`. It has `take` where the images have it.

    Args:
      source: the images that the regions were cropped from, in the same order.
      regions: see `Regions`.

    Raises:
      ValueError: the source is another one than that of the regions.
    """

    info: SourceInfo
    regions: Regions

    def __init__(self, source: Source, regions: Regions):
        info = source.info
        found = (len(source), info.image_shape, info.num_classes)
        stored = (len(regions.coords), regions.image_shape, regions.num_classes)
        for name, a, b in zip(
            ("records", "image shape", "classes"), found, stored, strict=True
        ):
            if a != b:
                raise ValueError(
                    f"{info.name} and its stored regions differ in {name}: {a} and "
                    f"{b}; store the regions anew"
                )
        if info.task != "classification":
            raise ValueError(f"{info.name}: stored regions need one label per image")
        self.info = info
        self.regions = regions
        self._source = source
        self._stored = {
            "region_box": regions.coords.astype(np.float32, copy=False),
            "region_flip": regions.flip,
            "region_index": regions.index.astype(np.int32, copy=False),
            "region_probability": regions.probability,
        }

    @property
    def groups(self) -> Sequence[str]:
        """The group of each record."""
        return self._source.groups

    @property
    def labels(self) -> np.ndarray:
        """The labels of all records."""
        return read_labels(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        stored = {name: array[index] for name, array in self._stored.items()}
        return {**self._source[index], **stored}

    @property
    def take(self) -> Callable[[np.ndarray], Record]:
        """The records of some indices, stacked.

        Raises:
          AttributeError: the images are read one by one; `hasattr` tells.
        """
        inner: Callable[[np.ndarray], Record] = self._source.take  # type: ignore

        def take(indices: np.ndarray) -> Record:
            stored = {name: array[indices] for name, array in self._stored.items()}
            return {**inner(indices), **stored}

        return take


def with_regions(source: Source, regions: Regions) -> RegionSource:
    """Joins images and their stored regions; see `RegionSource`."""
    return RegionSource(source, regions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionAugmentation:
    """Cuts stored regions out of a batch, then augments what was cut.

    Attributes:
      augmentation: what happens to the crops.
      crops: regions of each record.
      size: `(height, width)` of the crops.
      label_format: of the stored labels.
    """

    augmentation: Augmentation
    crops: int
    size: tuple[int, int]
    label_format: str

    def train(
        self,
        batch: Mapping[str, jax.Array],
        *,
        key: jax.Array,
        epoch: int | jax.Array,
        num_classes: int,
    ) -> dict[str, jax.Array]:
        """Does for a training batch what `Augmentation.train` does."""
        cut = choose_regions(
            batch,
            key=key,
            epoch=epoch,
            crops=self.crops,
            size=self.size,
            label_format=self.label_format,
            num_classes=num_classes,
        )
        return self.augmentation.train(
            cut, key=key, epoch=epoch, num_classes=num_classes
        )


def choose_regions(
    batch: Mapping[str, jax.Array],
    *,
    key: jax.Array,
    epoch: int | jax.Array,
    crops: int,
    size: tuple[int, int],
    label_format: str,
    num_classes: int,
) -> dict[str, jax.Array]:
    """Replaces every image of a batch by some of its stored crops.

    Pure, to be called under jit before any other augmentation. Which regions a record
    gets depends on `(key, epoch, index)` alone; none comes twice in an epoch.

    Args:
      batch: of a `RegionSource`, with `image`, `label`, `index` and the `region_`
        entries.
      key: the run's key; the same at every step.
      epoch: number of the epoch.
      crops: regions per record.
      size: `(height, width)` of the crops.
      label_format: of the stored regions.
      num_classes: of the stored regions.

    Returns:
      A batch of `b * crops` rows, the crops of one record next to each other: `image`
      in the dtype of the images, `target` float32 `[b * crops, num_classes]`, and the
      other entries repeated.

    Raises:
      KeyError: the batch carries no regions.
      ValueError: there are fewer regions than `crops`, or labels do not fit their
        format.
    """
    if "region_box" not in batch:
        raise KeyError("the batch has no stored regions; make its source with_regions")
    regions = batch["region_box"].shape[1]
    if not 1 <= crops <= regions:
        raise ValueError(f"crops must be from 1 to {regions}, got {crops}")
    epoch_key = jax.random.fold_in(jax.random.fold_in(key, _STREAM), epoch)

    def draw(index: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(epoch_key, index), regions)

    chosen = jax.vmap(draw)(batch["index"])[:, :crops]
    picked = {
        name: jax.vmap(lambda values, rows: values[rows])(batch[name], chosen)
        for name in batch
        if name.startswith("region_")
    }

    def cut(coords: jax.Array, flip: jax.Array) -> jax.Array:
        return crop_and_flip(batch["image"], coords, flip, size=size)

    # The image itself is not repeated, only what is cut from it.
    images = jax.vmap(cut, in_axes=1, out_axes=1)(
        picked["region_box"], picked["region_flip"]
    )
    targets = recover_labels(
        picked["region_index"],
        picked["region_probability"],
        label_format=label_format,
        num_classes=num_classes,
    )
    others = {
        name: jnp.repeat(value, crops, axis=0)
        for name, value in batch.items()
        if name not in picked and name != "image"
    }
    return {
        **others,
        "image": images.reshape(-1, *images.shape[2:]),
        "target": targets.reshape(-1, num_classes),
    }
