"""Stored regions: crops of every image with the soft labels that a teacher gave them.

`store_regions` shows random crops of each image to a teacher and keeps its compressed
answers, `write_regions` and `read_regions` are the file, `with_regions` adds them to
the records of a source, and `choose_regions` turns a batch of whole images into one of
crops with soft labels, on the device. Both sides cut by `jaxkd.data.crops`.

Reference: Shen, Xing, "A Fast Knowledge Distillation Framework for Visual Recognition",
ECCV 2022.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.data.augment import Augmentation
from jaxkd.data.crops import crop_and_flip, crop_one, draw_crops
from jaxkd.data.source import (
    DamagedFileError,
    Record,
    Source,
    SourceInfo,
    read_labels,
    require_path,
)
from jaxkd.numerics import compress_labels, kept_classes, recover_labels

# Sets the draw of regions apart from other draws of the same record and epoch.
_STREAM = 0x5E61


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
    """Writes a `.npz` file, whole or not at all."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    with open(unfinished, "wb") as file:
        np.savez(file, **dataclasses.asdict(regions))
    os.replace(unfinished, path)


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
        raise DamagedFileError(path, f"not a readable .npz file ({error})") from error
    fields = [field.name for field in dataclasses.fields(Regions)]
    if missing := [name for name in fields if name not in arrays]:
        raise DamagedFileError(path, f"it has no array {missing[0]!r}")
    try:
        return Regions(
            **{name: arrays[name] for name in fields[:4]},
            label_format=str(arrays["label_format"]),
            num_classes=int(arrays["num_classes"]),
            image_shape=tuple(arrays["image_shape"].tolist()),
        )
    except (ValueError, TypeError) as error:
        raise DamagedFileError(path, str(error)) from error


class RegionSource:
    """A classification source whose records also carry their stored regions.

    Adds to each record `region_box` float32 `[regions, 4]`, `region_flip` bool
    `[regions]`, `region_index` int32 `[regions, k]` and `region_probability`
    `[regions, k]`.

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
            "region_box": regions.coords.astype(np.float32),
            "region_flip": regions.flip,
            "region_index": regions.index.astype(np.int32),
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

    def take(self, indices: np.ndarray) -> Record:
        """The records `indices`, stacked."""
        take = getattr(self._source, "take", None)
        if take is not None:
            records = take(indices)
        else:
            each = [self._source[int(i)] for i in indices]
            records = {name: np.stack([r[name] for r in each]) for name in each[0]}
        stored = {name: array[indices] for name, array in self._stored.items()}
        return {**records, **stored}


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


def store_regions(
    source: Source,
    predict: Callable[[jax.Array], jax.Array],
    *,
    regions: int,
    key: jax.Array,
    image_size: tuple[int, int],
    label_format: str = "marginal_smoothing_k5",
    batch_size: int = 50,
    records: Sequence[int] | None = None,
) -> Regions:
    """Shows random crops of every image to a teacher and keeps its soft labels.

    The crops of record i depend on `(key, i)` alone. Everything is held in memory.

    Args:
      source: images of one shape.
      predict: from crops `[batch_size, *image_size, channels]` in the dtype of the
        source to logits `[batch_size, classes]`, normalisation included; jitted here.
      regions: crops per image.
      key: random key.
      image_size: the teacher's input size.
      label_format: see `jaxkd.numerics.compressed_labels`.
      batch_size: crops per call of `predict`.
      records: the records to show; None for all.

    Returns:
      The regions, to be written by `write_regions`.

    Raises:
      ValueError: an impossible number or format, or the teacher has other classes.
    """
    for name, value in (("regions", regions), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    info = source.info
    kept_classes(label_format, info.num_classes)
    height, width, _ = info.image_shape
    padded = -(-regions // batch_size) * batch_size

    @jax.jit
    def draw(record: jax.Array) -> tuple[jax.Array, jax.Array]:
        crop_key, flip_key = jax.random.split(jax.random.fold_in(key, record))
        coords = draw_crops(crop_key, 1, regions, aspect=width / height)[0]
        flip = jax.random.bernoulli(flip_key, shape=(regions,))
        return coords, flip

    @jax.jit
    def label(
        image: jax.Array, coords: jax.Array, flip: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        cut = functools.partial(crop_one, image, size=image_size)
        crops = jax.vmap(cut)(coords, flip)
        logits = predict(crops)
        if logits.shape != (batch_size, info.num_classes):
            raise ValueError(
                f"predict returned logits of shape {logits.shape} for {batch_size} "
                f"crops; {info.name} has {info.num_classes} classes"
            )
        probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        return compress_labels(probabilities, label_format=label_format)

    stored = []
    for record in range(len(source)) if records is None else records:
        image = jnp.asarray(source[record]["image"])
        coords, flip = draw(jnp.asarray(record))
        # The last chunk is filled up, so that one program serves all.
        rows = jnp.minimum(jnp.arange(padded), regions - 1).reshape(-1, batch_size)
        answers = [label(image, coords[chunk], flip[chunk]) for chunk in rows]
        index, probability = (
            np.concatenate([np.asarray(a) for a in arrays])[:regions]
            for arrays in zip(*answers, strict=True)
        )
        stored.append((np.asarray(coords), np.asarray(flip), index, probability))
    coords, flip, index, probability = (np.stack(a) for a in zip(*stored, strict=True))
    return Regions(
        coords=coords,
        flip=flip,
        index=index,
        probability=probability,
        label_format=label_format,
        num_classes=info.num_classes,
        image_shape=info.image_shape,
    )
