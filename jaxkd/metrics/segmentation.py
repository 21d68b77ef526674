"""Overlap and surface metrics of boolean masks, on the host.

`dice`, `iou`, `precision`, `recall` and `ravd` compare volumes; `hausdorff`, `hd95`,
`assd` and `asd` compare surfaces through exact Euclidean distances. Masks may have any
rank. `class_iou` and `mean_iou` read a confusion matrix of a whole data set;
`hlfd_scores` are the per-case scores of the HLFD paper's code.

Empty masks follow one rule everywhere: two empty masks agree (Dice and IoU are 1), one
empty mask gives 0, and distances to an empty mask are undefined (NaN). Callers drop NaN
from means and report how many they dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import ndimage

# ints are named because run-time checkers do not take them for floats.
Spacing = int | float | Sequence[int | float] | np.ndarray | None


def dice(pred: np.ndarray, truth: np.ndarray) -> float:
    """Dice coefficient `2 |P & R| / (|P| + |R|)`.

    Args:
      pred: predicted mask, bool, any shape.
      truth: reference mask, bool, same shape.

    Returns:
      A value in [0, 1]; 1 if both masks are empty.

    Raises:
      TypeError: a mask is not boolean.
      ValueError: the shapes differ.

    >>> dice(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    """
    return overlap_dice(*counts(pred, truth))


def iou(pred: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union (Jaccard index) `|P & R| / |P | R|`.

    Args:
      pred: predicted mask, bool, any shape.
      truth: reference mask, bool, same shape.

    Returns:
      A value in [0, 1]; 1 if both masks are empty.

    Raises:
      TypeError: a mask is not boolean.
      ValueError: the shapes differ.
    """
    return overlap_iou(*counts(pred, truth))


def counts(pred: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    """Voxels of the prediction, of the truth, and of their intersection.

    Args:
      pred: predicted mask, bool, any shape.
      truth: reference mask, bool, same shape.

    Returns:
      `(|P|, |R|, |P & R|)`.

    Raises:
      TypeError: a mask is not boolean.
      ValueError: the shapes differ.
    """
    pred, truth = _checked(pred, truth)
    return int(pred.sum()), int(truth.sum()), int((pred & truth).sum())


def overlap_dice(pred: int, truth: int, intersection: int) -> float:
    """Dice from voxel counts, so that slices of one case can be pooled first."""
    return 2 * intersection / (pred + truth) if pred + truth else 1.0


def overlap_iou(pred: int, truth: int, intersection: int) -> float:
    """Intersection over union from voxel counts; 1 if both masks are empty."""
    union = pred + truth - intersection
    return intersection / union if union else 1.0


def overlap_ravd(pred: int, truth: int) -> float:
    """Signed relative volume difference from voxel counts; NaN without reference."""
    return (pred - truth) / truth if truth else float("nan")


def precision(pred: np.ndarray, truth: np.ndarray) -> float:
    """Share of the predicted voxels that are right, `|P & R| / |P|`.

    Args:
      pred: predicted mask, bool, any shape.
      truth: reference mask, bool, same shape.

    Returns:
      A value in [0, 1]; NaN if nothing was predicted.

    Raises:
      TypeError: a mask is not boolean.
      ValueError: the shapes differ.
    """
    predicted, _, intersection = counts(pred, truth)
    return intersection / predicted if predicted else float("nan")


def recall(pred: np.ndarray, truth: np.ndarray) -> float:
    """Share of the reference voxels that were found, `|P & R| / |R|`.

    Args:
      pred: predicted mask, bool, any shape.
      truth: reference mask, bool, same shape.

    Returns:
      A value in [0, 1]; NaN if the reference is empty.

    Raises:
      TypeError: a mask is not boolean.
      ValueError: the shapes differ.
    """
    return precision(truth, pred)


def ravd(pred: np.ndarray, truth: np.ndarray) -> float:
    """Relative absolute volume difference, signed: `(|P| - |R|) / |R|`.

    The name is the literature's; the sign is kept as in MedPy, so that positive means
    too much was predicted. LiTS reports the absolute value.

    Args:
      pred: predicted mask, bool, any shape.
      truth: reference mask, bool, same shape.

    Returns:
      A value of at least -1 (nothing predicted); NaN if the reference is empty.

    Raises:
      TypeError: a mask is not boolean.
      ValueError: the shapes differ.
    """
    predicted, reference, _ = counts(pred, truth)
    return overlap_ravd(predicted, reference)


def surface(mask: np.ndarray) -> np.ndarray:
    """The mask's voxels that touch the background across a face.

    The mask minus its erosion by the element of face neighbours (4 in 2-D, 6 in 3-D).
    What lies outside the array counts as background.

    Args:
      mask: bool, any shape.

    Returns:
      A boolean array of the same shape.
    """
    return mask & ~ndimage.binary_erosion(mask)


def surface_distances(
    pred: np.ndarray, truth: np.ndarray, *, spacing: Spacing = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distances between the surfaces of two masks, in both directions.

    Args:
      pred: predicted mask, bool, any shape of rank >= 1.
      truth: reference mask, bool, same shape.
      spacing: voxel size, one number or one per axis; None measures in voxels.

    Returns:
      Float64 vectors: the distance of every surface voxel of `pred` to the surface of
      `truth`, and the reverse. Both are empty if either mask is empty.

    Raises:
      TypeError: a mask is not boolean.
      ValueError: the shapes differ, or the spacing is not positive or of a wrong
        length.
    """
    pred, truth = _checked(pred, truth)
    sampling = _checked_spacing(spacing, pred.ndim)
    if not pred.any() or not truth.any():
        return np.zeros(0), np.zeros(0)
    # Nothing outside the common bounding box is surface, and the box's outside counts
    # as background like the image's: cropping changes no distance and saves most work.
    box = bounding_box(pred | truth)
    pred_surface, truth_surface = surface(pred[box]), surface(truth[box])
    to_truth = ndimage.distance_transform_edt(~truth_surface, sampling=sampling)
    to_pred = ndimage.distance_transform_edt(~pred_surface, sampling=sampling)
    return np.asarray(to_truth)[pred_surface], np.asarray(to_pred)[truth_surface]


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Slices of the smallest box that holds all of a mask (empty ones if none)."""
    boxes = ndimage.find_objects(mask.astype(np.uint8), max_label=1)
    return boxes[0] or (slice(0, 0),) * mask.ndim


def hausdorff(pred: np.ndarray, truth: np.ndarray, *, spacing: Spacing = None) -> float:
    """Hausdorff distance: the largest of all distances between the surfaces.

    Args:
      pred: predicted mask, bool, any shape of rank >= 1.
      truth: reference mask, bool, same shape.
      spacing: voxel size, one number or one per axis; None measures in voxels.

    Returns:
      A distance; NaN if either mask is empty.

    Raises:
      TypeError: a mask is not boolean.
      ValueError: the shapes differ, or the spacing is wrong.
    """
    distances = np.concatenate(surface_distances(pred, truth, spacing=spacing))
    return float(distances.max()) if distances.size else float("nan")


def hd95(
    pred: np.ndarray,
    truth: np.ndarray,
    *,
    spacing: Spacing = None,
    pooling: Literal["pooled", "max"] = "pooled",
) -> float:
    """95th percentile of the distances between the surfaces.

    Two definitions are in use. `"pooled"` (MedPy, the project's default) takes the
    percentile of the distances of both directions together; `"max"` (MONAI) takes it
    per direction and keeps the larger. Percentiles interpolate linearly.

    Args:
      pred: predicted mask, bool, any shape of rank >= 1.
      truth: reference mask, bool, same shape.
      spacing: voxel size, one number or one per axis; None measures in voxels.
      pooling: `"pooled"` or `"max"`.

    Returns:
      A distance; NaN if either mask is empty.

    Raises:
      TypeError: a mask is not boolean.
      ValueError: the shapes differ, the spacing is wrong, or `pooling` is unknown.
    """
    if pooling not in ("pooled", "max"):
        raise ValueError(f"pooling must be 'pooled' or 'max', got {pooling!r}")
    forward, backward = surface_distances(pred, truth, spacing=spacing)
    if not forward.size:
        return float("nan")
    if pooling == "pooled":
        return float(np.percentile(np.concatenate([forward, backward]), 95))
    return float(max(np.percentile(forward, 95), np.percentile(backward, 95)))


def assd(pred: np.ndarray, truth: np.ndarray, *, spacing: Spacing = None) -> float:
    """Average symmetric surface distance: the mean over both directions together.

    Args:
      pred: predicted mask, bool, any shape of rank >= 1.
      truth: reference mask, bool, same shape.
      spacing: voxel size, one number or one per axis; None measures in voxels.

    Returns:
      A distance; NaN if either mask is empty.

    Raises:
      TypeError: a mask is not boolean.
      ValueError: the shapes differ, or the spacing is wrong.
    """
    distances = np.concatenate(surface_distances(pred, truth, spacing=spacing))
    return float(distances.mean()) if distances.size else float("nan")


def asd(pred: np.ndarray, truth: np.ndarray, *, spacing: Spacing = None) -> float:
    """Average distance from the predicted surface to the reference (one direction).

    Args:
      pred: predicted mask, bool, any shape of rank >= 1.
      truth: reference mask, bool, same shape.
      spacing: voxel size, one number or one per axis; None measures in voxels.

    Returns:
      A distance; NaN if either mask is empty.

    Raises:
      TypeError: a mask is not boolean.
      ValueError: the shapes differ, or the spacing is wrong.
    """
    forward, _ = surface_distances(pred, truth, spacing=spacing)
    return float(forward.mean()) if forward.size else float("nan")


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union per class of a whole data set.

    Args:
      confusion: counts `[classes, classes]`, rows are truth, columns predictions (see
        `jaxkd.metrics.confusion_matrix`, which removes an ignored label).

    Returns:
      Float64 `[classes]`; NaN for a class that occurs in neither.
    """
    confusion = np.asarray(confusion, np.float64)
    intersection = np.diagonal(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - intersection
    with np.errstate(invalid="ignore"):
        return intersection / union


def mean_iou(confusion: np.ndarray) -> float:
    """Mean of `class_iou` over the classes that occur in truth or prediction.

    Args:
      confusion: counts `[classes, classes]`, rows are truth.

    Returns:
      A value in [0, 1]; NaN if nothing was counted.
    """
    return nan_mean(class_iou(confusion))


def hlfd_scores(
    probabilities: np.ndarray,
    truth: np.ndarray,
    cases: Sequence[object] | np.ndarray,
    *,
    threshold: float = 0.4,
    voe: Literal["code", "textbook"] = "code",
) -> dict[str, float]:
    """Per-case scores as the HLFD authors' code computes them.

    With `P`, `G`, `I` the voxel counts of prediction, truth and intersection, summed
    over the slices of a case: `dice = (2I + 1) / (P + G + 1)`,
    `voe = 2 (P - I) / (P + G + 1e-7)` and `rvd = P / (G + 1e-7) - 1`. Cases without
    foreground in the truth are skipped; the scores are means over the others.

    That `voe` is the code's, not the volumetric overlap error of the literature;
    `voe="textbook"` gives `1 - I / (P + G - I)`. The threshold 0.4 is the code's too.

    Args:
      probabilities: foreground probability, float `[slices, height, width]`.
      truth: reference masks, bool `[slices, height, width]`.
      cases: the case of every slice (any hashable values), `[slices]`.
      threshold: a pixel is foreground where its probability exceeds this.
      voe: which overlap error.

    Returns:
      `{"dice", "voe", "rvd"}`; NaN where no case has foreground.

    Raises:
      TypeError: `truth` is not boolean.
      ValueError: shapes or lengths differ, or `voe` is unknown.

    Reference:
      Gorade et al., "Rethinking Intermediate Layers Design in Knowledge Distillation
      for Kidney and Liver Tumor Segmentation", ISBI 2024 (official code).
    """
    if voe not in ("code", "textbook"):
        raise ValueError(f"voe must be 'code' or 'textbook', got {voe!r}")
    probabilities = np.asarray(probabilities)
    pred, truth = _checked(probabilities > threshold, truth)
    if len(cases) != len(pred):
        raise ValueError(f"{len(pred)} slices need as many cases, got {len(cases)}")
    totals: dict[object, np.ndarray] = {}
    for case, p, g in zip(np.asarray(cases).tolist(), pred, truth, strict=True):
        totals[case] = totals.get(case, np.zeros(3)) + counts(p, g)
    scores = [_hlfd_case(*t, voe=voe) for t in totals.values() if t[1] > 0]
    means = np.mean(scores, axis=0) if scores else np.full(3, np.nan)
    return dict(zip(("dice", "voe", "rvd"), means.tolist(), strict=True))


def _hlfd_case(
    p: float, g: float, i: float, *, voe: Literal["code", "textbook"]
) -> tuple[float, float, float]:
    """Dice, VOE and RVD of one case from its voxel counts."""
    overlap_error = (
        2 * (p - i) / (p + g + 1e-7) if voe == "code" else 1 - i / (p + g - i)
    )
    return (2 * i + 1) / (p + g + 1), overlap_error, p / (g + 1e-7) - 1


def nan_mean(values: Sequence[float] | np.ndarray) -> float:
    """Mean of the defined (not NaN) values; NaN, without a warning, if there is none.

    >>> nan_mean([1.0, float("nan"), 3.0])
    2.0
    """
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def _checked(pred: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks as boolean arrays of one shape, or an error that says what to do."""
    pred, truth = np.asarray(pred), np.asarray(truth)
    for name, mask in (("pred", pred), ("truth", truth)):
        if mask.dtype != np.bool_:
            raise TypeError(
                f"{name} must be a boolean mask, got {mask.dtype}; compare first, as "
                "in probabilities > 0.5 or labels == 1"
            )
    if pred.shape != truth.shape:
        raise ValueError(
            f"pred has shape {pred.shape} and truth {truth.shape}; they must be equal"
        )
    return pred, truth


def _checked_spacing(spacing: Spacing, rank: int) -> tuple[float, ...]:
    """Voxel size per axis."""
    if rank == 0:
        raise ValueError("surface distances need masks of rank 1 or more, got a scalar")
    if spacing is None:
        return (1.0,) * rank
    sizes = tuple(np.asarray(spacing, np.float64).ravel().tolist())
    if np.ndim(spacing) == 0:
        sizes *= rank
    if len(sizes) != rank:
        raise ValueError(
            f"spacing has {len(sizes)} values for masks of rank {rank}; give one per "
            "axis, in the order of the axes"
        )
    if not all(np.isfinite(s) and s > 0 for s in sizes):
        raise ValueError(f"spacing must be positive, got {spacing}")
    return sizes
