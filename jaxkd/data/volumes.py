"""CT and MR volumes in NIfTI files, read as two-dimensional slices.

`VolumeSource` lists the slices of some cases and reads volumes when a slice is asked
for; `jaxkd.data.nifti` finds the cases of known data sets. Opening a source reads the
segmentations (to find slices with target) and the headers of the images. Reading one
slice of a compressed file decompresses the whole volume; with `cache=FOLDER` that
happens once for good, and slices are then read from disk alone. Voxels are taken as
stored, no reorientation: the orientation in the headers is compared, not applied.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import math
import os
import threading
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxkd.data.pixels import resize_image, resize_mask
from jaxkd.data.registry import import_extra
from jaxkd.data.source import (
    DamagedFileError,
    OnError,
    Record,
    SourceInfo,
    warn_skipped,
)

Target = Literal["tumor", "organ", "labels"]
Slices = Literal["target", "all"]
Normalization = Literal["window", "slice", "volume"]
Window = tuple[float, float]

# The most bytes that one byte of a file can stand for; deflate reaches 1032.
_EXPANSION = {".nii": 1, ".gz": 1032}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One patient: an image volume and its segmentation, of equal size."""

    name: str
    image: Path
    label: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolumeOptions:
    """How volumes become images and labels.

    Attributes:
      target: "tumor" (label >= 2 against the rest), "organ" (label > 0), or "labels"
        (all classes as they are).
      slices: "target" lists only slices that show the target, for training and test
        alike, as the published code of HLFD does; "all" lists every slice.
      window: lowest and highest intensity kept (Hounsfield units in CT), or None.
      normalization: "window" maps the window to [-1, 1]; "slice" and "volume" subtract
        the mean and divide by the standard deviation of the slice or of the whole
        volume, after clipping to the window if there is one.
      image_size: height and width of the slices; images are resized linearly before
        the window, labels by the nearest pixel. None needs volumes of one size.
      slice_axis: which axis of the file counts slices: 0, or 2 (which is then moved to
        the front, as `transpose(2, 0, 1)`).
      cache: folder for decompressed volumes; it grows to their size.
      volumes_in_memory: how many volumes each process keeps.

    Raises:
      ValueError: an option is impossible.
    """

    target: Target
    slices: Slices
    window: Window | None
    normalization: Normalization
    image_size: int | None
    slice_axis: int
    cache: str | Path | None = None
    volumes_in_memory: int = 4

    def __post_init__(self) -> None:
        if self.normalization == "window" and self.window is None:
            raise ValueError(
                "normalization 'window' needs window=(low, high), for example "
                "(-40, 160) for the liver in Hounsfield units"
            )
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError(f"window must have low < high, got {tuple(self.window)}")
        if self.slice_axis not in (0, 2):
            raise ValueError(f"slice_axis must be 0 or 2, got {self.slice_axis}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be >= 1, got {self.image_size}")
        if self.volumes_in_memory < 1:
            raise ValueError(
                f"volumes_in_memory must be >= 1, got {self.volumes_in_memory}"
            )


class VolumeSource:
    """Slices of volumes as records; the group of a record is its case.

    Voxels are taken as stored, no reorientation. A warning tells if the affines of an
    image and its segmentation differ.

    Args:
      name: the source's name.
      cases: the patients of this split.
      class_names: name per label of the files, the background first.
      options: how volumes become images and labels.
      on_error: "raise" or "skip"; "skip" reads all volumes once when opened, and leaves
        out a case if anything is wrong with one of its listed slices.

    Raises:
      DamagedFileError: a file cannot be read, or the two files of a case differ in
        size, or a label is no class, or a voxel is not finite (also later, when it is
        read).
      ValueError: no slices remain, or the target is no class.
    """

    def __init__(
        self,
        name: str,
        cases: Sequence[Case],
        *,
        class_names: Sequence[str],
        options: VolumeOptions,
        on_error: OnError = "raise",
    ):
        self._options = options
        self._labels_known = len(class_names)
        self._start()

        kept: list[Case] = []
        skipped: list[str] = []
        misaligned: list[str] = []
        index: list[tuple[int, int]] = []
        shape: tuple[int, ...] | None = None
        for case in cases:
            try:
                case_shape, is_aligned = self._check_headers(case)
                numbers = self._slices(case, case_shape[0])
                if on_error == "skip":
                    self._check_voxels(case, numbers)
            except DamagedFileError as error:
                if on_error == "raise":
                    raise
                skipped.append(error.path)
                continue
            shape = self._common_shape(shape, case, case_shape)
            index += [(len(kept), int(number)) for number in numbers]
            kept.append(case)
            if not is_aligned:
                misaligned.append(case.name)
        warn_skipped(name, skipped)
        self._warn(name, kept, misaligned)
        if not index or shape is None:
            raise ValueError(
                f"{name}: none of the {len(cases)} case(s) of this split has a slice "
                f"to read (target={options.target!r}, slices={options.slices!r}, "
                f"{len(skipped)} damaged)"
            )
        self._cases, self._index = tuple(kept), index
        self.groups: Sequence[str] = tuple(kept[i].name for i, _ in index)
        self.info = SourceInfo(
            name=name,
            task="segmentation",
            class_names=_target_names(class_names, options.target),
            image_shape=(shape[0], shape[1], shape[2]),
            skipped=tuple(skipped),
        )

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        position, number = self._index[index]
        case = self._cases[position]
        image, label = self._planes(case, number)
        label = _target_labels(label, self._options.target)
        if self._options.image_size is not None:
            image = resize_image(image, self._options.image_size)
            label = resize_mask(label, self._options.image_size)
        return {"image": self._normalise(image, case), "label": label}

    def slice_of(self, index: int) -> tuple[str, int]:
        """The case of a record and the number of its slice in the volume."""
        position, number = self._index[index]
        return self._cases[position].name, number

    def __getstate__(self) -> dict[str, Any]:
        # Each process opens its own volumes.
        own = ("_open", "_lock", "_moments")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._moments: dict[str, np.ndarray] = {}
        self._open: collections.OrderedDict[Path, np.ndarray] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def _warn(self, name: str, cases: list[Case], misaligned: list[str]) -> None:
        """Logs what is allowed but may not be meant, once for all cases."""
        if misaligned:
            _log.warning(
                "%s: the affines of image and segmentation differ in %d case(s), the "
                "first is %s; voxels are taken as stored",
                name,
                len(misaligned),
                misaligned[0],
            )
        files = (file for case in cases for file in (case.image, case.label))
        if self._options.cache is None and any(f.suffix == ".gz" for f in files):
            _log.warning(
                "%s: the volumes are compressed, so each slice unpacks its whole "
                "volume; pass cache=FOLDER",
                name,
            )

    def _planes(self, case: Case, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Image `[h, w, c]` and labels `[h, w]` of a slice as stored, checked."""
        image = np.asarray(self._volume(case.image)[number], np.float32)
        _check_finite(image, number, case.image)
        label = self._as_labels(self._volume(case.label)[number], case.label)
        return image.reshape(*image.shape[:2], -1), label

    def _check_voxels(self, case: Case, numbers: np.ndarray) -> None:
        """Reads all that the records of a case will read."""
        for number in numbers:
            self._planes(case, int(number))
        if self._options.normalization == "volume" and len(numbers):
            self._statistics(case)

    def _check_headers(self, case: Case) -> tuple[tuple[int, ...], bool]:
        """Shape of the case's image with slices first, and if affines are equal."""
        image_header, label_header = _header(case.image), _header(case.label)
        image, label = image_header.shape, label_header.shape
        if len(image) not in (3, 4) or len(label) != 3:
            raise DamagedFileError(
                case.label if len(image) in (3, 4) else case.image,
                f"expected a volume of 3 axes, got shape {label} for the labels and "
                f"{image} for the image",
            )
        if tuple(image[:3]) != tuple(label):
            raise DamagedFileError(
                case.label,
                f"the segmentation has size {_size(label)} but {case.image.name} has "
                f"{_size(image[:3])}",
            )
        axes = _slices_first(len(image), self._options.slice_axis)
        # Files store affines in single precision, often by way of quaternions.
        is_aligned = np.allclose(
            image_header.affine, label_header.affine, rtol=1e-3, atol=1e-3
        )
        return tuple(image[i] for i in axes), is_aligned

    def _common_shape(
        self,
        shape: tuple[int, ...] | None,
        case: Case,
        case_shape: tuple[int, ...],
    ) -> tuple[int, ...]:
        channels = case_shape[3] if len(case_shape) == 4 else 1
        size = self._options.image_size
        height, width = (size, size) if size is not None else case_shape[1:3]
        if shape is not None and shape != (height, width, channels):
            raise ValueError(
                f"slices of {case.image} are {height}x{width} with {channels} "
                f"channel(s), those before {shape[0]}x{shape[1]} with {shape[2]}; "
                "set image_size to bring them to one size"
            )
        return height, width, channels

    def _slices(self, case: Case, count: int) -> np.ndarray:
        if self._options.slices == "all":
            return np.arange(count)

        def find() -> np.ndarray:
            volume = self._as_labels(self._read(case.label), case.label)
            target = _target_labels(volume, self._options.target)
            return np.flatnonzero((target > 0).any(axis=(1, 2)))

        return self._stored(case.label, f"slices-{self._options.target}", find)

    def _as_labels(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Labels as int32, checked."""
        with np.errstate(invalid="ignore"):  # what is not finite fails the next check
            labels = np.asarray(values).astype(np.int32)
        if values.dtype.kind == "f" and not np.array_equal(labels, values):
            raise DamagedFileError(path, "the segmentation holds fractions")
        if labels.min() < 0 or labels.max() >= self._labels_known:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise DamagedFileError(
                path,
                f"the segmentation holds the label {wrong} but there are "
                f"{self._labels_known} classes",
            )
        return labels

    def _normalise(self, image: np.ndarray, case: Case) -> np.ndarray:
        options = self._options
        if options.normalization == "window" and options.window is not None:
            return window(image, *options.window)
        image = _clip(image, options.window)
        if options.normalization == "slice":
            mean, std = image.mean((0, 1)), image.std((0, 1))
        else:
            mean, std = self._statistics(case)
        std = np.where(std > 0, std, 1)
        return ((image - mean) / std).astype(np.float32)

    def _statistics(self, case: Case) -> np.ndarray:
        """Mean and standard deviation per channel of a clipped volume, `[2, c]`."""
        if case.name not in self._moments:
            purpose = f"moments-{self._options.window}"
            self._moments[case.name] = self._stored(
                case.image, purpose, lambda: self._compute_statistics(case)
            )
        return self._moments[case.name]

    def _compute_statistics(self, case: Case) -> np.ndarray:
        # Plane by plane: a volume in double precision would be large.
        moments = []
        for number, plane in enumerate(self._volume(case.image)):
            _check_finite(plane, number, case.image)
            plane = _clip(np.asarray(plane, np.float64), self._options.window)
            plane = plane.reshape(plane.shape[0] * plane.shape[1], -1)
            moments.append((plane.mean(0), plane.var(0)))
        means, variances = np.moveaxis(np.asarray(moments), 1, 0)
        # Planes are of one size, so variances within and between them add up.
        std = np.sqrt(variances.mean(0) + means.var(0))
        return np.stack([means.mean(0), std])

    def _volume(self, path: Path) -> np.ndarray:
        """The volume of a file, slices first, from memory, cache or the file."""
        # One reader at a time: two threads would decompress the same file twice.
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
            volume = self._stored(path, "volume", lambda: self._read(path))
            self._open[path] = volume
            # A case is an image and its segmentation.
            while len(self._open) > 2 * self._options.volumes_in_memory:
                self._open.popitem(last=False)
            return volume

    def _stored(
        self, path: Path, purpose: str, make: Callable[[], np.ndarray]
    ) -> np.ndarray:
        """What `make` returns, kept in the cache folder if there is one."""
        if self._options.cache is None:
            return make()
        stat = path.stat()
        identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        identity += f" {purpose} {self._options.slice_axis} {self._labels_known}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        folder = Path(self._options.cache)
        stored = folder / f"{path.name.partition('.')[0]}-{digest}.npy"
        if not stored.exists():
            values = make()
            folder.mkdir(parents=True, exist_ok=True)
            # Written aside and moved, so that other processes see all or nothing.
            aside = folder / f"{stored.stem}-{uuid.uuid4().hex}.tmp"
            try:
                with open(aside, "wb") as file:
                    np.save(file, values, allow_pickle=False)
                os.replace(aside, stored)
            finally:
                aside.unlink(missing_ok=True)
        return np.load(stored, mmap_mode="r", allow_pickle=False)

    def _read(self, path: Path) -> np.ndarray:
        image = _header(path)
        announced = math.prod(image.shape) * image.get_data_dtype().itemsize
        size = path.stat().st_size
        if announced > size * _EXPANSION.get(path.suffix, math.inf):
            raise DamagedFileError(
                path,
                f"it cannot be read (the header announces {announced} bytes, more than "
                f"a file of {size} bytes can hold)",
            )
        try:
            # Keeps integers as they are; uncompressed files are mapped, not read.
            values = np.asanyarray(image.dataobj)
        except (OSError, EOFError, ValueError, MemoryError, zlib.error) as error:
            raise DamagedFileError(path, f"it cannot be read ({error})") from error
        if values.dtype == np.float64:
            with np.errstate(over="ignore"):  # becomes infinite, which is refused
                values = values.astype(np.float32)
        return values.transpose(_slices_first(values.ndim, self._options.slice_axis))


def window(volume: np.ndarray, low: float, high: float) -> np.ndarray:
    """Clips intensities to [low, high] and maps that range to [-1, 1].

    Args:
      volume: numbers of any shape.
      low: becomes -1.
      high: becomes 1.

    Returns:
      float32 of the same shape.

    Raises:
      ValueError: `low` is not below `high`.
    """
    if not low < high:
        raise ValueError(f"window must have low < high, got ({low}, {high})")
    clipped = np.clip(np.asarray(volume, np.float32), low, high)
    return ((clipped - low) * (2 / (high - low)) - 1).astype(np.float32)


def _header(path: Path) -> Any:
    """Opens a NIfTI file without reading its values."""
    nibabel = import_extra("nibabel", "nifti")
    if not path.exists():
        raise DamagedFileError(path, "there is no such file")
    try:
        return nibabel.load(path)
    except (
        nibabel.filebasedimages.ImageFileError,
        nibabel.spatialimages.HeaderDataError,
        OSError,
        EOFError,
        ValueError,
        zlib.error,
    ) as error:
        raise DamagedFileError(path, f"not a readable NIfTI file ({error})") from error


def _slices_first(ndim: int, slice_axis: int) -> tuple[int, ...]:
    """The order of axes that brings slices to the front and keeps the others."""
    return (slice_axis, *(i for i in range(ndim) if i != slice_axis))


def _check_finite(plane: np.ndarray, number: int, path: Path) -> None:
    if not np.isfinite(plane).all():
        raise DamagedFileError(path, f"slice {number} holds voxels that are not finite")


def _clip(image: np.ndarray, limits: Window | None) -> np.ndarray:
    return image if limits is None else np.clip(image, *limits)


def _target_labels(labels: np.ndarray, target: str) -> np.ndarray:
    if target == "tumor":
        return (labels >= 2).astype(np.int32)
    if target == "organ":
        return (labels > 0).astype(np.int32)
    return labels


def _target_names(class_names: Sequence[str], target: str) -> tuple[str, ...]:
    if target == "labels":
        return tuple(class_names)
    if target == "tumor" and len(class_names) < 3:
        raise ValueError(
            f"target 'tumor' is label 2 but the labels are {', '.join(class_names)}"
        )
    return class_names[0], target


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(int(n)) for n in shape)
