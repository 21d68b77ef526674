"""The idx format of MNIST, Fashion-MNIST and their family, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxkd.data.arrays import ArraySource, records_alone
from jaxkd.data.registry import register
from jaxkd.data.source import DamagedFileError, Split, check_split, require_path

_PREFIXES = {"train": "train", "test": "t10k"}
_DTYPES = {
    0x08: ">u1",
    0x09: ">i1",
    0x0B: ">i2",
    0x0C: ">i4",
    0x0D: ">f4",
    0x0E: ">f8",
}


@register()
def idx(
    *,
    split: Split,
    path: str | Path,
    class_names: Sequence[str] = tuple("0123456789"),
    image_size: int | None = None,
) -> ArraySource:
    """A folder with `train-images-idx3-ubyte`, `t10k-images-idx3-ubyte` and labels.

    Args:
      split: "train" or "test" (the `t10k` files).
      path: the folder; each file may end in `.gz`.
      class_names: name per class.
      image_size: resize to this height and width.

    Raises:
      FileNotFoundError: a file is missing.
      DamagedFileError: a file is truncated or not idx, or images and labels differ in
        number.
    """
    check_split(split)
    folder = require_path(path, "idx")
    image_path = _find(folder, f"{_PREFIXES[split]}-images-idx3-ubyte")
    label_path = _find(folder, f"{_PREFIXES[split]}-labels-idx1-ubyte")
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.ndim != 3 or images.dtype != np.uint8:
        raise DamagedFileError(image_path, "expected a three-dimensional byte array")
    if labels.shape != images.shape[:1]:
        raise DamagedFileError(
            label_path,
            f"it holds labels of shape {labels.shape} for {len(images)} images",
        )
    return ArraySource(
        folder.name,
        images,
        labels,
        class_names=class_names,
        groups=records_alone(split, len(images)),
        image_size=image_size,
    )


def read_idx(path: str | Path) -> np.ndarray:
    """Reads an idx file into an array.

    The format: two zero bytes, one for the type, one for the number of axes; each
    axis length as a big-endian 32-bit integer; the values, big-endian, row-major.

    Args:
      path: the file; gzipped if its name ends in `.gz`.

    Raises:
      DamagedFileError: the file does not follow the format or has another length.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DamagedFileError(path, f"it cannot be read ({error})") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _DTYPES:
        raise DamagedFileError(path, "it does not start as an idx file")
    dtype, ndim = np.dtype(_DTYPES[data[2]]), data[3]
    start = 4 + 4 * ndim
    shape = np.frombuffer(data[4:start].ljust(4 * ndim, b"\0"), ">u4")
    expected = start + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if len(data) != expected:
        raise DamagedFileError(
            path, f"it has {len(data)} bytes where its header announces {expected}"
        )
    values = np.frombuffer(data, dtype, offset=start).reshape(tuple(shape))
    return values.astype(dtype.newbyteorder("="))


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"idx: {folder} has neither {name} nor {name}.gz")
