"""Sources that hold everything in memory: arrays, `.npz` files, scikit-learn digits.

`ArraySource` is also what small file formats (idx, CIFAR, the shipped sample) end in.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxkd.data.pixels import resize_image, resize_mask
from jaxkd.data.registry import import_extra, register
from jaxkd.data.source import (
    DamagedFileError,
    Record,
    SourceInfo,
    Split,
    Task,
    check_split,
    require_path,
)
from jaxkd.data.split import split_by_group


class ArraySource:
    """Images and labels in memory.

    Args:
      name: the source's name.
      images: uint8 or float `[n, h, w, c]`, or `[n, h, w]` for one channel. Float
        images become float32.
      labels: integer classes `[n]` (also `[n, 1]`), or `[n, h, w]` per pixel.
      class_names: name per class; default "0", "1", ... up to the largest label.
      groups: group per record; default each record alone.
      image_size: resize to this height and width: images bilinear and antialiased,
        dense labels nearest.

    Raises:
      ValueError: shapes disagree, or a label is not a class.
      TypeError: images are neither uint8 nor float, or labels are not integers.
    """

    info: SourceInfo

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        class_names: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        image_size: int | None = None,
    ):
        images = _as_images(images, name)
        labels = _as_labels(labels, images, name)
        if class_names is None:
            class_names = [str(i) for i in range(max(2, int(labels.max()) + 1))]
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise ValueError(
                f"{name}: labels run from {labels.min()} to {labels.max()} but there "
                f"are {len(class_names)} classes"
            )
        if groups is None:
            groups = [str(i) for i in range(len(images))]
        if len(groups) != len(images):
            raise ValueError(
                f"{name}: {len(groups)} groups given for {len(images)} images"
            )
        if image_size is not None:
            images = np.stack([resize_image(image, image_size) for image in images])
            if labels.ndim == 3:
                labels = np.stack([resize_mask(mask, image_size) for mask in labels])
        self._images, self._labels = images, labels
        self._groups = tuple(groups)
        task: Task = "segmentation" if labels.ndim == 3 else "classification"
        height, width, channels = images.shape[1:]
        self.info = SourceInfo(
            name=name,
            task=task,
            class_names=tuple(class_names),
            image_shape=(height, width, channels),
        )

    @property
    def groups(self) -> Sequence[str]:
        """The group of each record."""
        return self._groups

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        return {"image": self._images[index], "label": np.asarray(self._labels[index])}

    @property
    def labels(self) -> np.ndarray:
        """The labels of all records."""
        return self._labels

    def take(self, indices: np.ndarray) -> Record:
        """The records `indices`, stacked."""
        return {"image": self._images[indices], "label": self._labels[indices]}

    def select(self, indices: Sequence[int] | np.ndarray) -> ArraySource:
        """A source of only the records `indices`."""
        return ArraySource(
            self.info.name,
            self._images[indices],
            self._labels[indices],
            class_names=self.info.class_names,
            groups=[self._groups[i] for i in indices],
        )


@register()
def arrays(
    *,
    split: Split,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    image_size: int | None = None,
) -> ArraySource:
    """Arrays of the caller; see `ArraySource` for their form.

    Args:
      split: which side these arrays are; they are taken as they come.
      images: images of this side.
      labels: labels of this side.
      class_names: name per class.
      groups: group per record; default each record alone.
      image_size: resize to this height and width.
    """
    return ArraySource(
        "arrays",
        images,
        labels,
        class_names=class_names,
        groups=records_alone(split, len(images)) if groups is None else groups,
        image_size=image_size,
    )


@register()
def npz(
    *,
    split: Split,
    path: str | Path,
    image_key: str | None = None,
    label_key: str | None = None,
    group_key: str | None = None,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
) -> ArraySource:
    """A `.npz` file with arrays of both splits, as MedMNIST or Keras write them.

    Object arrays are refused, because reading them runs code from the file.

    Args:
      split: "train" or "test".
      path: the file.
      image_key: name of the image array, "{split}" standing for the split; default
        `{split}_images` or `x_{split}`.
      label_key: name of the label array; default `{split}_labels` or `y_{split}`.
      group_key: name of an array with the group of each record.
      class_names: name per class; default "0", "1", ... up to the largest label of
        both splits.
      image_size: resize to this height and width.

    Raises:
      DamagedFileError: the file is not a readable `.npz`.
      KeyError: no such array; the message lists those there are.
      ValueError: an array holds Python objects.
    """
    path = require_path(path, "npz")
    image_keys = (image_key,) if image_key else ("{split}_images", "x_{split}")
    label_keys = (label_key,) if label_key else ("{split}_labels", "y_{split}")
    with open(path, "rb") as handle:
        try:
            file = np.load(handle, allow_pickle=False)
        except (
            OSError,
            ValueError,
            EOFError,
            MemoryError,
            zipfile.BadZipFile,
        ) as error:
            raise DamagedFileError(
                path, f"not a readable .npz file ({error})"
            ) from error
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DamagedFileError(path, "this is a single array, not an .npz file")
        images = _npz_array(file, path, split, image_keys)
        labels = _npz_array(file, path, split, label_keys)
        groups = records_alone(split, len(images))
        if group_key is not None:
            groups = _npz_array(file, path, split, (group_key,)).astype(str).tolist()
        if class_names is None:
            # Both splits have the classes of both, whichever occur in each.
            known = [labels]
            for other in ("train", "test"):
                if any(key.format(split=other) in file for key in label_keys):
                    known.append(_npz_array(file, path, other, label_keys))
            count = 1 + max(int(x.max(initial=0)) for x in known)
            class_names = [str(i) for i in range(max(2, count))]
    return ArraySource(
        path.stem,
        images,
        labels,
        class_names=class_names,
        groups=groups,
        image_size=image_size,
    )


@register()
def digits(
    *,
    split: Split,
    test_fraction: float = 0.2,
    seed: int = 0,
    image_size: int | None = None,
) -> ArraySource:
    """The 1,797 handwritten digits of scikit-learn, 8x8, float32 in [0, 1].

    Args:
      split: "train" or "test".
      test_fraction: share of the records that is the test split.
      seed: of the split.
      image_size: resize to this height and width.

    Raises:
      ImportError: scikit-learn is missing.

    Reference:
      E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI
      Machine Learning Repository, 1998 (CC BY 4.0).
    """
    check_split(split)
    bunch = import_extra("sklearn.datasets", "digits").load_digits()
    source = ArraySource(
        "digits",
        (bunch.images / 16).astype(np.float32),
        bunch.target,
        image_size=image_size,
    )
    train, test = split_by_group(source.groups, test_fraction, seed)
    return source.select(train if split == "train" else test)


def records_alone(split: str, count: int) -> list[str]:
    """Groups of one record each, of other names in each split."""
    return [f"{split}/{i}" for i in range(count)]


def _as_images(images: np.ndarray, name: str) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or not len(images):
        raise ValueError(
            f"{name}: images must be [n, h, w, c] or [n, h, w] with n >= 1, "
            f"got {images.shape}"
        )
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"{name}: images must be uint8 or float, got {images.dtype}")
    return images.astype(np.float32)


def _as_labels(labels: np.ndarray, images: np.ndarray, name: str) -> np.ndarray:
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{name}: labels must be integers, got {labels.dtype}")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape not in (images.shape[:1], images.shape[:3]):
        raise ValueError(
            f"{name}: labels must be {images.shape[:1]} or {images.shape[:3]} for "
            f"images of shape {images.shape}, got {labels.shape}"
        )
    return labels.astype(np.int32)


def _npz_array(
    file: np.lib.npyio.NpzFile,
    path: Path,
    split: str,
    keys: tuple[str, ...],
) -> np.ndarray:
    wanted = [key.format(split=split) for key in keys]
    for name in wanted:
        if name in file:
            break
    else:
        raise KeyError(
            f"{path} has no array {' or '.join(wanted)}; it has {', '.join(file.files)}"
        )
    try:
        _check_member(file, path, name)
        return file[name]
    except DamagedFileError:
        raise
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise DamagedFileError(path, f"array {name!r}: {error}") from error
        raise ValueError(
            f"array {name!r} of {path} holds Python objects, which can run code when "
            "read; save it again as numbers"
        ) from error
    except (
        OSError,
        EOFError,
        MemoryError,
        RuntimeError,  # an unknown compression, or a password
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DamagedFileError(path, f"array {name!r}: {error}") from error


def _check_member(file: np.lib.npyio.NpzFile, path: Path, name: str) -> None:
    """Checks that a member is an array and large enough for what it announces."""
    archive = file.zip
    if archive is None:
        raise DamagedFileError(path, "the archive is closed")
    member = name if name in archive.namelist() else f"{name}.npy"
    with archive.open(member) as content:
        if content.read(6) != b"\x93NUMPY":
            raise DamagedFileError(path, f"{name!r} is not an array in .npy format")
        content.seek(0)
        if np.lib.format.read_magic(content) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(content)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(content)
        room = archive.getinfo(member).file_size - content.tell()
    announced = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and announced > room:
        raise DamagedFileError(
            path,
            f"array {name!r} announces {announced} bytes but has only {room}",
        )
