"""Accuracy, F1 and calibration of class scores, on the host.

`top_k_accuracy` (and `accuracy`, its k = 1) and `macro_f1` judge decisions;
`expected_calibration_error` and `negative_log_likelihood` judge probabilities;
`confusion_matrix` counts what is taken for what, also over the pixels of a
segmentation. All take numpy arrays of any float or integer type and compute in float64.
"""

from __future__ import annotations

import numpy as np


def true_class_rank(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes are placed before the true one; 0 means it comes first.

    Classes of equal score are ordered by index, so a network that gives all classes
    one score is not right by luck of the sort.

    Args:
      scores: logits or probabilities, `[examples, classes]`.
      labels: true classes, integer `[examples]`.

    Returns:
      Integer `[examples]`, from 0 to classes - 1.

    Raises:
      TypeError: the labels are not integers.
      ValueError: shapes disagree, a label is out of range, or a score is NaN.
    """
    scores, labels = checked_scores(scores, labels)
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    return np.sum((scores > own) | ((scores == own) & before), axis=1)


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, *, k: int) -> float:
    """Share of examples whose true class is among the `k` highest scores.

    Args:
      scores: logits or probabilities, `[examples, classes]`.
      labels: true classes, integer `[examples]`.
      k: how many classes may be named; more than there are counts as all.

    Returns:
      A value in [0, 1]; NaN without examples.

    Raises:
      TypeError: the labels are not integers.
      ValueError: `k` < 1, shapes disagree, a label is out of range, a score is NaN.

    >>> top_k_accuracy(np.array([[0.5, 0.3, 0.2]]), np.array([1]), k=2)
    1.0
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return mean(true_class_rank(scores, labels) < k)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of examples whose highest score is the true class (top-1 accuracy).

    Args:
      scores: logits or probabilities, `[examples, classes]`.
      labels: true classes, integer `[examples]`.

    Returns:
      A value in [0, 1]; NaN without examples.

    Raises:
      TypeError: the labels are not integers.
      ValueError: shapes disagree, a label is out of range, or a score is NaN.
    """
    return top_k_accuracy(scores, labels, k=1)


def confusion_matrix(
    truth: np.ndarray,
    predicted: np.ndarray,
    *,
    num_classes: int,
    ignore: int | None = None,
) -> np.ndarray:
    """Counts of (true class, predicted class) pairs.

    Args:
      truth: true classes, integer, any shape.
      predicted: predicted classes, integer, same shape.
      num_classes: how many classes there are.
      ignore: a label of the truth whose places are not counted, e.g. 255.

    Returns:
      int64 `[num_classes, num_classes]`; rows are truth, columns predictions.

    Raises:
      TypeError: labels are not integers.
      ValueError: shapes differ, or a class is out of range.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if truth.shape != predicted.shape:
        raise ValueError(
            f"truth has shape {truth.shape} and predicted {predicted.shape}; they "
            "must be equal"
        )
    if ignore is not None:
        keep = truth != ignore
        truth, predicted = truth[keep], predicted[keep]
    for name, classes in (("truth", truth), ("predicted", predicted)):
        check_classes(classes, num_classes, name)
    pairs = truth.astype(np.int64).ravel() * num_classes + predicted.ravel()
    counts = np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def macro_f1(truth: np.ndarray, predicted: np.ndarray, *, num_classes: int) -> float:
    """Mean over all classes of F1 = 2 TP / (2 TP + FP + FN), with 0/0 = 0.

    A class that is never predicted, or that never occurs, stays in the mean with 0.

    Args:
      truth: true classes, integer `[examples]`.
      predicted: predicted classes, integer `[examples]`.
      num_classes: how many classes there are.

    Returns:
      A value in [0, 1]; NaN without examples.

    Raises:
      TypeError: labels are not integers.
      ValueError: shapes differ, or a class is out of range.
    """
    confusion = confusion_matrix(truth, predicted, num_classes=num_classes)
    if not confusion.sum():
        return float("nan")
    hits = np.diagonal(confusion)
    # 2 TP + FP + FN is what the row and the column of a class hold together.
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float(np.mean(2 * hits / np.maximum(total, 1)))


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, *, bins: int = 15
) -> float:
    """Expected calibration error of the predicted class.

    `sum_b n_b / N |accuracy_b - confidence_b|` over equal, right-closed bins
    `(b / B, (b + 1) / B]` of the highest probability.

    Args:
      probabilities: `[examples, classes]`, in [0, 1].
      labels: true classes, integer `[examples]`.
      bins: the number of bins B.

    Returns:
      A value in [0, 1]; NaN without examples.

    Raises:
      TypeError: the labels are not integers.
      ValueError: `bins` < 1, shapes disagree, a label is out of range, or a value is
        not a probability.

    Reference:
      Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    correct = true_class_rank(probabilities, labels) == 0
    confidence = checked_probabilities(probabilities).max(axis=1, initial=0.0)
    return calibration_error(confidence, correct, bins=bins)


def calibration_error(
    confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15
) -> float:
    """Expected calibration error from confidences and whether they were right.

    Args:
      confidence: probability of the predicted class, `[examples]`.
      correct: whether the predicted class is the true one, bool `[examples]`.
      bins: the number of equal, right-closed bins.

    Returns:
      A value in [0, 1]; NaN without examples.

    Raises:
      ValueError: `bins` < 1.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if not len(confidence):
        return float("nan")
    confidence = np.asarray(confidence, np.float64)
    edges = np.linspace(0, 1, bins + 1)
    # side="left" makes the bins right-closed; clipping keeps an exact 0, and a 1 that
    # rounding carried above 1, in the outer bins.
    index = np.searchsorted(edges, confidence, side="left") - 1
    index = np.clip(index, 0, bins - 1)
    # n_b |acc_b - conf_b| is the absolute sum of (correct - confidence) in the bin.
    gaps = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean of `-log p` of the true class, in nats.

    A probability that rounded to zero counts as the smallest positive number of its
    type, so that one confident mistake gives a large value and not infinity.

    Args:
      probabilities: `[examples, classes]`, in [0, 1].
      labels: true classes, integer `[examples]`.

    Returns:
      A non-negative value; NaN without examples.

    Raises:
      TypeError: the labels are not integers.
      ValueError: shapes disagree, a label is out of range, or a value is not a
        probability.
    """
    probabilities = checked_probabilities(probabilities)
    _, labels = checked_scores(probabilities, labels)
    own = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    return mean(negative_log(own))


def negative_log(probabilities: np.ndarray) -> np.ndarray:
    """`-log p` in float64, with p clipped to the smallest positive number of its type.

    Args:
      probabilities: floating, any shape.

    Returns:
      Non-negative float64 of the same shape.
    """
    tiny = np.finfo(probabilities.dtype).tiny
    return np.maximum(-np.log(np.maximum(probabilities, tiny), dtype=np.float64), 0.0)


def mean(values: np.ndarray) -> float:
    """Mean as a float; NaN, without a warning, of nothing."""
    return float(np.mean(values)) if np.size(values) else float("nan")


def checked_scores(
    scores: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels as arrays whose shapes and values agree, or a clear error."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(
            "scores must be [examples, classes] and labels [examples], got "
            f"{scores.shape} and {labels.shape}"
        )
    check_classes(labels, scores.shape[1], "labels")
    if np.isnan(scores).any():
        row = int(np.flatnonzero(np.isnan(scores).any(axis=1))[0])
        raise ValueError(f"scores of example {row} are not numbers (NaN)")
    return scores, labels


def checked_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities as a floating array within [0, 1] up to rounding."""
    probabilities = np.asarray(probabilities)
    if not np.issubdtype(probabilities.dtype, np.floating):
        raise ValueError(f"probabilities must be floats, got {probabilities.dtype}")
    # NaN fails both comparisons, so it ends here as well.
    if not ((probabilities >= 0) & (probabilities <= 1 + 1e-3)).all():
        raise ValueError(
            "probabilities must lie in [0, 1]; apply a softmax to logits first"
        )
    return probabilities


def check_classes(classes: np.ndarray, num_classes: int, name: str) -> None:
    """Checks that class labels are integers from 0 to `num_classes` - 1.

    Raises:
      TypeError: not integers.
      ValueError: out of range.
    """
    if not np.issubdtype(classes.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got {classes.dtype}")
    if classes.size and not 0 <= classes.min() <= classes.max() < num_classes:
        wrong = classes.min() if classes.min() < 0 else classes.max()
        raise ValueError(
            f"{name} must be classes from 0 to {num_classes - 1}, got {wrong}"
        )
