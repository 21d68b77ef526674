"""CIFAR-10 and CIFAR-100 in their published form, pickles written by Python 2.

A pickle can run any code when it is read. `load_pickle` therefore rebuilds only arrays
of numbers, containers, numbers and strings, and refuses everything else. Not even numpy
rebuilds the arrays: given a spoiled state, it may crash.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxkd.data.arrays import ArraySource, records_alone
from jaxkd.data.registry import register
from jaxkd.data.source import DamagedFileError, Split, check_split, require_path


@register()
def cifar10(
    *, split: Split, path: str | Path, image_size: int | None = None
) -> ArraySource:
    """CIFAR-10: `data_batch_1` to `data_batch_5`, `test_batch` and `batches.meta`.

    Args:
      split: "train" or "test".
      path: the folder `cifar-10-batches-py`, or the one that holds it.
      image_size: resize from 32 to this height and width.

    Raises:
      FileNotFoundError: a file is missing.
      DamagedFileError: a file is truncated, hostile or of another form.

    Reference:
      A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    check_split(split)
    folder = _folder(path, "cifar-10-batches-py")
    files = [f"data_batch_{i}" for i in range(1, 6)]
    parts = [
        _read_batch(folder / name, "labels", 10)
        for name in (files if split == "train" else ["test_batch"])
    ]
    images = np.concatenate([images for images, _ in parts])
    return ArraySource(
        "cifar10",
        images,
        np.concatenate([labels for _, labels in parts]),
        groups=records_alone(split, len(images)),
        class_names=_read_names(folder / "batches.meta", "label_names", 10),
        image_size=image_size,
    )


@register()
def cifar100(
    *,
    split: Split,
    path: str | Path,
    labels: Literal["fine", "coarse"] = "fine",
    image_size: int | None = None,
) -> ArraySource:
    """CIFAR-100: `train`, `test` and `meta`.

    Args:
      split: "train" or "test".
      path: the folder `cifar-100-python`, or the one that holds it.
      labels: the 100 fine or the 20 coarse classes.
      image_size: resize from 32 to this height and width.

    Raises:
      FileNotFoundError: a file is missing.
      DamagedFileError: a file is truncated, hostile or of another form.

    Reference:
      A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    check_split(split)
    folder = _folder(path, "cifar-100-python")
    num_classes = {"fine": 100, "coarse": 20}[labels]
    images, classes = _read_batch(folder / split, f"{labels}_labels", num_classes)
    return ArraySource(
        "cifar100",
        images,
        classes,
        groups=records_alone(split, len(images)),
        class_names=_read_names(folder / "meta", f"{labels}_label_names", num_classes),
        image_size=image_size,
    )


def load_pickle(path: str | Path) -> dict[str, Any]:
    """Reads a pickled dictionary of arrays, lists, numbers and strings.

    Byte strings of Python 2 become `str` (latin-1).

    Args:
      path: the file; protocols 0 to 4.

    Returns:
      The dictionary.

    Raises:
      DamagedFileError: the file is no pickle, is truncated, asks for anything else, or
        holds no dictionary.
    """
    data = Path(path).read_bytes()
    try:
        content = _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise DamagedFileError(path, str(error)) from error
    except (
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        MemoryError,
    ) as error:
        # What a damaged pickle stream ends in depends on where it is damaged.
        raise DamagedFileError(
            path, f"not a readable pickle ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(content, dict):
        raise DamagedFileError(path, "it does not hold a dictionary")
    return {
        key: value.values if isinstance(value, _Array) else value
        for key, value in content.items()
    }


# Stand-ins for what array pickles ask for. Slots keep the stream from attaching
# anything to them.
class _Dtype:
    """An item type of plain numbers."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, *flags: Any):
        del flags
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biuf][1248]", code):
            raise pickle.UnpicklingError(f"arrays of type {code!r} are not allowed")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array that is rebuilt from its shape, type and bytes."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, item, is_fortran, raw = state
        if isinstance(raw, str):
            raw = raw.encode("latin1")
        if not isinstance(item, _Dtype) or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("an array is not made of bytes")
        order = "F" if is_fortran else "C"
        self.values = np.frombuffer(raw, item.dtype).reshape(shape, order=order)


class _Reconstruct:
    """Stands for the function that makes an empty array, to be filled by its state."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> _Array:
        return _Array()


class _Encode:
    """How pickles of protocol 2 spell bytes; any other codec is refused."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"the codec {encoding!r} is not allowed")
        return text.encode("latin1")


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    # Only passed to `_reconstruct`.
    ("numpy", "ndarray"): object(),
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encode(),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module_name}.{global_name}, which only hostile or "
                "foreign files do; nothing was run"
            ) from None


def _folder(path: str | Path, name: str) -> Path:
    path = require_path(path, "cifar")
    return path / name if (path / name).is_dir() else path


def _read_batch(
    path: Path, label_key: str, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    content = _read_dict(path)
    data, labels = content.get("data"), content.get(label_key)
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.uint8
        or data.ndim != 2
        or data.shape[1] != 3 * 32 * 32
    ):
        raise DamagedFileError(path, "its entry 'data' is not bytes of [n, 3072]")
    if (
        not isinstance(labels, list)
        or len(labels) != len(data)
        or not all(type(x) is int and 0 <= x < num_classes for x in labels)
    ):
        raise DamagedFileError(
            path,
            f"its entry {label_key!r} is not {len(data)} numbers below {num_classes}",
        )
    # Rows are planes of red, green and blue.
    images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.asarray(labels, np.int32)


def _read_names(path: Path, key: str, num_classes: int) -> list[str]:
    names = _read_dict(path).get(key)
    if not isinstance(names, list) or len(names) != num_classes:
        raise DamagedFileError(path, f"its entry {key!r} is not {num_classes} names")
    return [str(name) for name in names]


def _read_dict(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"cifar: there is no file {path}")
    return load_pickle(path)
