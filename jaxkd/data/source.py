"""What a data source is: records by index, each with a group, and how it fails.

A source knows nothing of batches, epochs, devices or augmentation. It must survive
pickling, because worker processes of the pipeline receive a copy.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

Task = Literal["classification", "segmentation"]
Split = Literal["train", "test"]
OnError = Literal["raise", "skip"]
Record = dict[str, np.ndarray]
T = TypeVar("T")

_REPLACE = (
    "replace the file (data sets of many files can leave it out: on_error='skip')"
)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """What all records of a source have in common.

    Attributes:
      name: the source's name, for messages and reports.
      task: "classification" or "segmentation".
      class_names: name per class; for segmentation, the first is the background.
      image_shape: `(height, width, channels)` of every image as delivered.
      skipped: files left out because they are damaged (with `on_error="skip"`).

    Raises:
      ValueError: fewer than two classes, or an impossible shape.
    """

    name: str
    task: Task
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.class_names) < 2:
            raise ValueError(
                f"{self.name} has {len(self.class_names)} classes; at least 2 are "
                "needed to learn anything"
            )
        if min(self.image_shape) < 1:
            raise ValueError(
                f"{self.name} has images of shape {self.image_shape}; every side "
                "must be at least 1"
            )

    @property
    def num_classes(self) -> int:
        """The number of classes, the background included."""
        return len(self.class_names)


@runtime_checkable
class Source(Protocol):
    """Random access to labelled images.

    Attributes:
      info: what all records have in common.
      groups: name of the patient, volume or file of each record; records of one group
        never fall on both sides of a split, and segmentation metrics pool them.

    `source[i]` is `{"image", "label"}`: `image` uint8 or float32 `[h, w, c]`; `label`
    int32, `()` for classification or `[h, w]` for segmentation. A source may also have
    `take(indices)`, which returns the same entries stacked, if that is faster.
    """

    info: SourceInfo

    @property
    def groups(self) -> Sequence[str]:
        """The group of each record."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class DamagedFileError(ValueError):
    """A file of a data set cannot be read or contradicts its format.

    Args:
      path: the file.
      reason: what is wrong with it, in a few words.
      remedy: what to do.
    """

    def __init__(self, path: str | Path, reason: str, remedy: str = _REPLACE):
        # All arguments go to the base class: the error must survive pickling when a
        # worker process raises it.
        super().__init__(str(path), reason, remedy)

    @property
    def path(self) -> str:
        """The damaged file."""
        return self.args[0]

    def __str__(self) -> str:
        path, reason, remedy = self.args
        # Reasons that come from decoders may have several lines.
        reason = " ".join(reason.split())
        return f"cannot use {path}: {reason}; {remedy}"


def keep_readable(
    items: Iterable[T], check: Callable[[T], Any], *, name: str, on_error: OnError
) -> tuple[list[T], tuple[str, ...]]:
    """Leaves out the items that are damaged, if that is what the caller wants.

    Args:
      items: what to check, for example file names.
      check: raises `DamagedFileError` for a damaged item. Not called with
        `on_error="raise"`: then reading the record raises it, and nothing is read
        twice.
      name: the source's name, for the message.
      on_error: "raise" or "skip".

    Returns:
      The items that remain, and the paths of the damaged files.
    """
    if on_error == "raise":
        return list(items), ()
    good, skipped = [], []
    for item in items:
        try:
            check(item)
        except DamagedFileError as error:
            skipped.append(error.path)
        else:
            good.append(item)
    warn_skipped(name, skipped)
    return good, tuple(skipped)


def warn_skipped(name: str, skipped: Sequence[str]) -> None:
    """Logs once how many files were left out and names the first."""
    if skipped:
        _log.warning(
            "%s: left out %d damaged file(s), the first is %s",
            name,
            len(skipped),
            skipped[0],
        )


def read_labels(source: Source) -> np.ndarray:
    """The class of every record of a classification source, int32 `[records]`.

    Sources that hold their labels in memory have them as `labels`; of others every
    record is read once.
    """
    labels = getattr(source, "labels", None)
    if labels is None:
        labels = [source[i]["label"] for i in range(len(source))]
    return np.asarray(labels, np.int32)


def require_path(path: str | Path, name: str) -> Path:
    """Returns `path` as an existing path.

    Raises:
      FileNotFoundError: there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{name}: there is nothing at {path}")
    return path


def check_split(split: str) -> None:
    """Checks the name of a split.

    Raises:
      ValueError: neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
