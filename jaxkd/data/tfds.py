"""Any TFDS data set that is prepared for random access; TensorFlow is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxkd.data.arrays import records_alone
from jaxkd.data.pixels import resize_image, resize_mask
from jaxkd.data.registry import import_extra, register
from jaxkd.data.source import Record, SourceInfo, Split, Task, check_split, require_path
from jaxkd.data.split import check_disjoint

_PREPARE = (
    'prepare it with tfds.builder(name, file_format="array_record")'
    ".download_and_prepare()"
)


class TfdsSource:
    """Records of a TFDS data source; see `tfds`."""

    def __init__(
        self,
        name: str,
        records: Any,
        *,
        task: Task,
        class_names: Sequence[str],
        groups: Sequence[str],
        image_key: str,
        label_key: str,
        image_size: int | None,
    ):
        self._name, self._records = name, records
        self._num_classes = len(class_names)
        self._image_key, self._label_key = image_key, label_key
        self._image_size = image_size
        self._dense = task == "segmentation"
        self.groups: Sequence[str] = tuple(groups)
        if not self.groups:
            raise ValueError(f"{name}: the split has no records")
        height, width, channels = self[0]["image"].shape
        self.info = SourceInfo(
            name=name,
            task=task,
            class_names=tuple(class_names),
            image_shape=(height, width, channels),
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._records[index]
        image = np.asarray(record[self._image_key])
        if image.dtype == np.uint16:
            image = image.astype(np.float32) / np.float32(65535)
        elif image.dtype != np.uint8:
            image = image.astype(np.float32)
        if image.ndim == 2:
            image = image[..., None]
        label = self._as_label(np.asarray(record[self._label_key]), index)
        if self._dense:
            label = label.reshape(label.shape[:2])
        if self._image_size is not None:
            image = resize_image(image, self._image_size)
            if self._dense:
                label = resize_mask(label, self._image_size)
        return {"image": image, "label": label}

    def _as_label(self, label: np.ndarray, index: int) -> np.ndarray:
        """Labels as int32, checked."""
        if label.min() < 0 or label.max() >= self._num_classes:
            wrong = label.min() if label.min() < 0 else label.max()
            hint = "; TFDS marks records without a label by -1" if wrong == -1 else ""
            raise ValueError(
                f"{self._name}: record {index} has the label {wrong}, labels must be "
                f"in [0, {self._num_classes - 1}]{hint}"
            )
        return label.astype(np.int32)


@register()
def tfds(
    *,
    split: Split,
    dataset: str | None = None,
    path: str | Path | None = None,
    train: str = "train",
    test: str = "test",
    image_key: str = "image",
    label_key: str | None = None,
    group_key: str | None = None,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
) -> TfdsSource:
    """A data set of TensorFlow Datasets, read through `tfds.data_source`.

    It must have been prepared in the array_record or parquet format, which TensorFlow
    Datasets does without TensorFlow.

    Args:
      split: "train" or "test".
      dataset: its name in TFDS, with config and version if wanted
        (`"cifar10:3.0.2"`); not needed if `path` is the folder of one data set.
      path: the TFDS data folder (default: TFDS's own), or, without `dataset`, the
        folder of a prepared version (the one that holds `features.json`).
      train: which records are the training split, in TFDS notation
        (`"train[:80%]"`).
      test: which records are the test split (`"validation"`, `"train[80%:]"`).
      image_key: the feature that is the image: uint8, float, or uint16, which is
        divided by 65535 and becomes float32.
      label_key: the feature that is the label; default "label", else
        "segmentation_mask".
      group_key: a feature that names the record's group (patient, volume), text or
        number; it is read from all records of both splits when the set is opened.
        Default: each record alone.
      class_names: name per class; default the names that TFDS knows. Needed for masks.
      image_size: resize to this height and width, masks by the nearest pixel.

    Raises:
      ImportError: `tensorflow_datasets` is missing.
      FileNotFoundError: the data set is not prepared at `path`.
      KeyError: no data set, split or feature of that name.
      ValueError: it is prepared in another format, class names are missing, a group is
        in both splits, or a label is no class (also later, when it is read).
    """
    check_split(split)
    package = import_extra("tensorflow_datasets", "tfds")
    builder = _builder(package, dataset, path)
    features = dict(builder.info.features)
    if label_key is None:
        label_key = "label" if "label" in features else "segmentation_mask"
    keys = (image_key, label_key) + (() if group_key is None else (group_key,))
    for key in keys:
        if key not in features:
            raise KeyError(
                f"{builder.name} has no feature {key!r}; it has {', '.join(features)}"
            )
    if class_names is None:
        class_names = getattr(features[label_key], "names", None)
    if class_names is None:
        raise ValueError(
            f"TFDS has no class names for {builder.name}/{label_key}; set class_names"
        )
    wanted = train if split == "train" else test
    if wanted.partition("[")[0] not in builder.info.splits:
        raise KeyError(
            f"{builder.name} has no split {wanted!r}; it has "
            f"{', '.join(builder.info.splits)} (set train= and test=)"
        )
    try:
        records = builder.as_data_source(split=wanted)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.name} at {builder.data_dir} is not in a random-access format; "
            f"{_PREPARE}"
        ) from error
    if group_key is None:
        groups = records_alone(split, len(records))
    else:
        unused = (image_key, label_key)
        groups = _groups(package, builder, wanted, group_key, unused)
        other = test if split == "train" else train
        if other.partition("[")[0] in builder.info.splits:
            others = _groups(package, builder, other, group_key, unused)
            check_disjoint(groups, others, builder.name)
    dense = len(features[label_key].shape) >= 2
    return TfdsSource(
        builder.name,
        records,
        task="segmentation" if dense else "classification",
        class_names=class_names,
        groups=groups,
        image_key=image_key,
        label_key=label_key,
        image_size=image_size,
    )


def _groups(
    package: Any, builder: Any, wanted: str, key: str, unused: tuple[str, ...]
) -> list[str]:
    """The group of each record of a split; `unused` features are not decoded."""
    decoders = {name: package.decode.SkipDecoding() for name in unused if name != key}
    records = builder.as_data_source(split=wanted, decoders=decoders)
    values = (records[i][key] for i in range(len(records)))
    return [x.decode() if isinstance(x, bytes) else str(x) for x in values]


def _builder(package: Any, dataset: str | None, path: str | Path | None) -> Any:
    """The builder of a prepared data set, by folder or by name."""
    if path is not None:
        path = require_path(path, "tfds")
    if dataset is None:
        if path is None:
            raise ValueError("tfds needs dataset='NAME', or the path of a data set")
        if not (path / "features.json").exists():
            raise FileNotFoundError(
                f"tfds: {path} holds no features.json; give the folder of a version, "
                "or dataset='NAME' as well"
            )
        return package.builder_from_directory(str(path))
    try:
        builder = package.builder(dataset, data_dir=None if path is None else str(path))
    except package.core.registered.DatasetNotFoundError as error:
        reason = str(error).partition("\n")[0]
        raise KeyError(f"tfds: {reason}") from error
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"tfds: {dataset} is not prepared in {builder.data_dir}; {_PREPARE}"
        )
    return builder
