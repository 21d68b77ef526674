"""Evaluators: exact metrics of a data set from batches of any size.

The loop makes one evaluator per evaluation, passes it the valid rows of every batch
and asks for the result. Nothing is averaged per batch, so the numbers do not depend on
the batch size, and a record that came twice is an error and not a quiet bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxkd.metrics import classification, segmentation


class SegmentationEvaluator:
    """Dice, IoU, RAVD per case and HD95, ASSD per slice.

    Slices of one group (a patient, a volume) are pooled into one case, and overlap is
    scored per case; surfaces are compared per slice, in 2-D. Networks with two classes
    predict foreground where its probability exceeds `threshold`; with more classes the
    arg-max decides. The values are means over cases (slices) and over the foreground
    classes (all but class 0).

    Args:
      num_classes: classes including the background.
      class_names: one name per class.
      groups: the group of every record of the source, by record index.
      threshold: foreground threshold for two classes.
      spacing: pixel size, one number or (row, column); None measures in pixels.

    Raises:
      ValueError: fewer than two classes, names of a wrong number, or a threshold
        outside (0, 1).
    """

    def __init__(
        self,
        *,
        num_classes: int,
        class_names: Sequence[str],
        groups: Sequence[str],
        threshold: float = 0.5,
        spacing: segmentation.Spacing = None,
    ):
        if num_classes < 2:
            raise ValueError(
                "segmentation needs at least 2 classes (background and one more), "
                f"got {num_classes}"
            )
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")
        self._num_classes = num_classes
        self._names = _checked_names(class_names, num_classes)
        self._groups = list(groups)
        self._threshold = threshold
        self._spacing = spacing
        self._seen = _Seen()
        # Per case: pixels of prediction, truth and intersection, [3, classes].
        self._cases: dict[str, np.ndarray] = {}
        self._pairs: list[_MaskPair] = []

    def update(
        self, *, index: np.ndarray, label: np.ndarray, probabilities: np.ndarray
    ) -> None:
        """Adds the valid rows of a batch.

        Args:
          index: record index in the source, integer `[batch]`.
          label: true classes, integer `[batch, height, width]`.
          probabilities: float `[batch, height, width, classes]`.

        Raises:
          TypeError: index or label are not integers.
          ValueError: shapes disagree, a value is out of range or not finite, or a
            record came before.
        """
        index, label, probabilities = map(np.asarray, (index, label, probabilities))
        expected = (*label.shape, self._num_classes)
        if label.ndim != 3 or probabilities.shape != expected:
            raise ValueError(
                "label must be [batch, height, width] and probabilities "
                f"[batch, height, width, {self._num_classes}], got {label.shape} and "
                f"{probabilities.shape}"
            )
        classification.check_classes(label, self._num_classes, "label")
        finite = np.isfinite(probabilities).all(axis=(1, 2, 3))
        if not finite.all():
            raise ValueError(
                f"probabilities of record {index[~finite][0]} are not finite"
            )
        self._seen.add(index, len(label), len(self._groups))
        predicted = self.predict(probabilities)
        cases = [self._groups[record] for record in index.tolist()]
        for case, pred, truth in zip(cases, predicted, label, strict=True):
            self._add(case, pred, truth)

    def predict(self, probabilities: np.ndarray) -> np.ndarray:
        """The classes this evaluator reads off probabilities.

        Args:
          probabilities: float `[..., classes]`.

        Returns:
          int64 `[...]`.
        """
        if self._num_classes == 2:
            return (probabilities[..., 1] > self._threshold).astype(np.int64)
        return np.argmax(probabilities, axis=-1)

    def result(self, *, surface: bool = True) -> dict[str, float]:
        """The metrics of all records passed so far.

        Args:
          surface: whether to compute the surface distances, which take by far the
            longest.

        Returns:
          `"dice"`, `"iou"` and `"ravd"` (signed) per case; `"ravd_undefined"`, the
          number of (case, class) pairs without truth, which have no RAVD; with more
          than two classes also `"dice/<name>"`. With `surface` also `"hd95"` (pooled
          definition), `"assd"` and `"hd95_undefined"`, the number of (slice, class)
          pairs where prediction or truth is empty and both distances are undefined.
          A mean over nothing is NaN.

        Raises:
          ValueError: nothing was passed.
        """
        self._seen.require_any()
        # [cases, 3, foreground classes]
        counts = np.stack(list(self._cases.values()))[:, :, 1:]
        pixels = [
            [(int(p), int(r), int(i)) for p, r, i in case.T.tolist()] for case in counts
        ]
        scores = np.array(
            [[segmentation.overlap_dice(p, r, i) for p, r, i in c] for c in pixels]
        )
        ravd = [segmentation.overlap_ravd(p, r) for c in pixels for p, r, _ in c]
        result = {
            "dice": float(scores.mean()),
            "iou": classification.mean(
                np.array(
                    [segmentation.overlap_iou(p, r, i) for c in pixels for p, r, i in c]
                )
            ),
            "ravd": segmentation.nan_mean(ravd),
            "ravd_undefined": float(np.isnan(ravd).sum()),
        }
        if self._num_classes > 2:
            names = self._names[1:]
            for name, score in zip(names, scores.mean(axis=0).tolist(), strict=True):
                result[f"dice/{name}"] = score
        if surface:
            result |= self._surface_result()
        return result

    def _add(self, group: str, pred: np.ndarray, truth: np.ndarray) -> None:
        """Counts one slice into its case and keeps its masks for the surfaces."""
        classes = self._num_classes
        confusion = classification.confusion_matrix(truth, pred, num_classes=classes)
        counts = np.stack(
            [confusion.sum(axis=0), confusion.sum(axis=1), np.diagonal(confusion)]
        )
        self._cases[group] = self._cases.get(group, np.zeros_like(counts)) + counts
        for c in range(1, classes):
            self._pairs.append(_MaskPair.pack(pred == c, truth == c))

    def _surface_result(self) -> dict[str, float]:
        hd95, assd = [], []
        for pair in self._pairs:
            distances = np.concatenate(
                segmentation.surface_distances(*pair.unpack(), spacing=self._spacing)
            )
            defined = distances.size > 0
            hd95.append(np.percentile(distances, 95) if defined else np.nan)
            assd.append(distances.mean() if defined else np.nan)
        return {
            "hd95": segmentation.nan_mean(hd95),
            "assd": segmentation.nan_mean(assd),
            "hd95_undefined": float(np.isnan(hd95).sum()),
        }


class ClassificationEvaluator:
    """Top-1 and top-5 accuracy, macro-F1, calibration error and log-likelihood.

    Keeps a few numbers per record, not the probabilities.

    Args:
      num_classes: how many classes there are.
      class_names: one name per class.

    Raises:
      ValueError: fewer than two classes, or names of a wrong number.
    """

    def __init__(self, *, num_classes: int, class_names: Sequence[str]):
        if num_classes < 2:
            raise ValueError(
                f"classification needs at least 2 classes, got {num_classes}"
            )
        _checked_names(class_names, num_classes)
        self._num_classes = num_classes
        self._seen = _Seen()
        self._columns: list[tuple[np.ndarray, ...]] = []

    def update(
        self, *, index: np.ndarray, label: np.ndarray, probabilities: np.ndarray
    ) -> None:
        """Adds the valid rows of a batch.

        Args:
          index: record index in the source, integer `[batch]`.
          label: true classes, integer `[batch]`.
          probabilities: float `[batch, classes]`.

        Raises:
          TypeError: index or label are not integers.
          ValueError: shapes disagree, a value is out of range or not a probability,
            or a record came before.
        """
        probabilities = classification.checked_probabilities(probabilities)
        probabilities, label = classification.checked_scores(probabilities, label)
        if probabilities.shape[1] != self._num_classes:
            raise ValueError(
                f"probabilities have {probabilities.shape[1]} classes, expected "
                f"{self._num_classes}"
            )
        self._seen.add(np.asarray(index), len(label), None)
        own = np.take_along_axis(probabilities, label[:, None].astype(np.int64), 1)
        self._columns.append(
            (
                label,
                np.argmax(probabilities, axis=1),
                classification.true_class_rank(probabilities, label),
                probabilities.max(axis=1),
                classification.negative_log(own[:, 0]),
            )
        )

    def result(self) -> dict[str, float]:
        """The metrics of all records passed so far.

        Returns:
          `"accuracy"`; `"top5"` if there are more than five classes (with fewer it is
          1 whatever the network does); `"macro_f1"`; `"ece"` (15 bins); `"nll"` in
          nats.

        Raises:
          ValueError: nothing was passed.
        """
        label, predicted, rank, confidence, nll = self._gather()
        result = {"accuracy": classification.mean(rank == 0)}
        if self._num_classes > 5:
            result["top5"] = classification.mean(rank < 5)
        result["macro_f1"] = classification.macro_f1(
            label, predicted, num_classes=self._num_classes
        )
        result["ece"] = classification.calibration_error(confidence, rank == 0)
        result["nll"] = classification.mean(nll)
        return result

    def confusion(self) -> np.ndarray:
        """Counts of all records passed so far, int64 `[classes, classes]`.

        Rows are truth, columns predictions.

        Raises:
          ValueError: nothing was passed.
        """
        label, predicted, *_ = self._gather()
        return classification.confusion_matrix(
            label, predicted, num_classes=self._num_classes
        )

    def _gather(self) -> list[np.ndarray]:
        self._seen.require_any()
        return [np.concatenate(c) for c in zip(*self._columns, strict=True)]


class _Seen:
    """The records an evaluator has had."""

    def __init__(self) -> None:
        self._records: set[int] = set()

    def add(self, index: np.ndarray, rows: int, size: int | None) -> None:
        """Notes the records of a batch.

        Raises:
          TypeError: the index is not of integers.
          ValueError: not one index per row, an index beyond `size`, or one seen before.
        """
        if not np.issubdtype(index.dtype, np.integer):
            raise TypeError(f"index must be integers, got {index.dtype}")
        if index.shape != (rows,):
            raise ValueError(
                f"a batch of {rows} rows needs as many indices, got shape {index.shape}"
            )
        new: set[int] = set()
        for record in index.tolist():
            if record in self._records or record in new:
                raise ValueError(
                    f"record {record} was passed twice; pass only valid rows, and use "
                    "a new evaluator for every evaluation"
                )
            if record < 0 or (size is not None and record >= size):
                raise ValueError(f"record {record} is not in a source of {size}")
            new.add(record)
        self._records |= new

    def require_any(self) -> None:
        """Raises ValueError if no record was passed."""
        if not self._records:
            raise ValueError("nothing was evaluated: no record was passed to update")


@dataclasses.dataclass(frozen=True)
class _MaskPair:
    """Two masks, cut to their common box and packed eight pixels to the byte.

    What the surfaces need of a slice, in some hundred bytes instead of hundreds of
    kilobytes, so that large test sets fit in memory until the result is asked for.
    """

    shape: tuple[int, ...]
    pred: np.ndarray
    truth: np.ndarray

    @classmethod
    def pack(cls, pred: np.ndarray, truth: np.ndarray) -> _MaskPair:
        box = segmentation.bounding_box(pred | truth)
        pred, truth = pred[box], truth[box]
        return cls(pred.shape, np.packbits(pred), np.packbits(truth))

    def unpack(self) -> tuple[np.ndarray, np.ndarray]:
        size = int(np.prod(self.shape))
        pred, truth = (
            np.unpackbits(bits, count=size).astype(bool).reshape(self.shape)
            for bits in (self.pred, self.truth)
        )
        return pred, truth


def _checked_names(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    if len(names) != num_classes:
        raise ValueError(
            f"{num_classes} classes need as many names, got {len(names)}: "
            f"{', '.join(names)}"
        )
    return tuple(names)
