"""Metrics on the host: segmentation, classification, and the loop's evaluators."""

from jaxkd.metrics.agreement import (
    euclidean_distance,
    hard_divergence,
    kl_divergence,
    log_probability_distance,
    squared_distance,
    top_k_agreement,
)
from jaxkd.metrics.classification import (
    accuracy,
    confusion_matrix,
    expected_calibration_error,
    macro_f1,
    negative_log_likelihood,
    top_k_accuracy,
)
from jaxkd.metrics.evaluators import ClassificationEvaluator, SegmentationEvaluator
from jaxkd.metrics.segmentation import (
    asd,
    assd,
    class_iou,
    dice,
    hausdorff,
    hd95,
    hlfd_scores,
    iou,
    mean_iou,
    precision,
    ravd,
    recall,
    surface_distances,
)

__all__ = [
    "ClassificationEvaluator",
    "SegmentationEvaluator",
    "accuracy",
    "asd",
    "assd",
    "class_iou",
    "confusion_matrix",
    "dice",
    "euclidean_distance",
    "expected_calibration_error",
    "hard_divergence",
    "hausdorff",
    "hd95",
    "hlfd_scores",
    "iou",
    "kl_divergence",
    "log_probability_distance",
    "macro_f1",
    "mean_iou",
    "negative_log_likelihood",
    "precision",
    "ravd",
    "recall",
    "squared_distance",
    "surface_distances",
    "top_k_accuracy",
    "top_k_agreement",
]
