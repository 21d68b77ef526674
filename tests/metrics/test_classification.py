"""Classification metrics against scikit-learn, by hand and by brute force."""

import math

import numpy as np
import pytest
import sklearn.metrics

from jaxkd import metrics

# Confusion of the reference vector trust_f1_topk_rmspe (scikit-learn 1.9.1).
CONFUSION = np.array([[11, 1, 2, 2], [4, 13, 2, 9], [5, 3, 24, 3], [3, 2, 2, 15]])


def examples(seed=0, n=200, classes=7, sharpness=2.0):
    generator = np.random.default_rng(seed)
    logits = sharpness * generator.normal(size=(n, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.where(
        generator.random(n) < 0.4, logits.argmax(1), generator.integers(classes, size=n)
    )
    return probabilities, labels


def brute_calibration(probabilities, labels, bins):
    total = 0.0
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            right = (predicted == labels)[inside].mean()
            total += inside.mean() * abs(right - confidence[inside].mean())
    return total


def pairs_of(confusion):
    truth, predicted = np.indices(confusion.shape)
    counts = confusion.ravel()
    return np.repeat(truth.ravel(), counts), np.repeat(predicted.ravel(), counts)


def test_confusion_f1_and_accuracy_equal_the_reference_vector():
    truth, predicted = pairs_of(CONFUSION)
    found = metrics.confusion_matrix(truth, predicted, num_classes=4)
    np.testing.assert_array_equal(found, CONFUSION)
    f1 = metrics.macro_f1(truth, predicted, num_classes=4)
    assert f1 == pytest.approx(0.610997721510863, rel=1e-12)
    accuracy = metrics.accuracy(np.eye(4)[predicted], truth)
    assert accuracy == pytest.approx(0.6237623762376238, rel=1e-12)


def test_values_equal_scikit_learn():
    probabilities, labels = examples()
    predicted = probabilities.argmax(1)
    for k in (1, 2, 5):
        expected = sklearn.metrics.top_k_accuracy_score(labels, probabilities, k=k)
        assert metrics.top_k_accuracy(probabilities, labels, k=k) == expected
    assert metrics.macro_f1(labels, predicted, num_classes=7) == pytest.approx(
        sklearn.metrics.f1_score(labels, predicted, average="macro")
    )
    assert metrics.negative_log_likelihood(probabilities, labels) == pytest.approx(
        sklearn.metrics.log_loss(labels, probabilities)
    )
    np.testing.assert_array_equal(
        metrics.confusion_matrix(labels, predicted, num_classes=7),
        sklearn.metrics.confusion_matrix(labels, predicted),
    )


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_equals_the_sum_over_bins(bins):
    probabilities, labels = examples(1)
    assert metrics.expected_calibration_error(
        probabilities, labels, bins=bins
    ) == pytest.approx(brute_calibration(probabilities, labels, bins))


def test_calibration_bins_are_closed_on_the_right():
    # 0.5 of two bins belongs to the lower one, where it meets the other example.
    probabilities = np.array([[0.5, 0.5, 0.0], [0.3, 0.4, 0.3]])
    error = metrics.expected_calibration_error(probabilities, np.array([0, 0]), bins=2)
    assert error == pytest.approx(abs((1 - 0.5) + (0 - 0.4)) / 2)


def test_a_perfectly_confident_and_right_network_is_calibrated():
    probabilities, labels = np.eye(3, dtype=np.float32), np.arange(3)
    assert metrics.expected_calibration_error(probabilities, labels) == 0
    assert metrics.negative_log_likelihood(probabilities, labels) == 0


def test_ties_go_to_the_lower_class():
    scores = np.zeros((3, 3))
    labels = np.array([0, 1, 2])
    assert metrics.accuracy(scores, labels) == pytest.approx(1 / 3)
    assert metrics.top_k_accuracy(scores, labels, k=2) == pytest.approx(2 / 3)
    assert metrics.top_k_accuracy(scores, labels, k=9) == 1


def test_a_class_never_predicted_stays_in_the_f1_mean():
    truth, predicted = np.array([0, 1, 2]), np.array([0, 1, 1])
    expected = sklearn.metrics.f1_score(
        truth, predicted, average="macro", zero_division=0
    )
    assert metrics.macro_f1(truth, predicted, num_classes=3) == pytest.approx(expected)
    # A class that does not occur at all counts as 0 as well.
    four = metrics.macro_f1(truth, predicted, num_classes=4)
    assert four == pytest.approx(0.75 * expected)


def test_the_order_of_examples_does_not_matter():
    probabilities, labels = examples(2)
    order = np.random.default_rng(0).permutation(len(labels))
    for function in (
        metrics.accuracy,
        metrics.expected_calibration_error,
        metrics.negative_log_likelihood,
    ):
        shuffled = function(probabilities[order], labels[order])
        assert shuffled == pytest.approx(function(probabilities, labels))


def test_a_confident_mistake_has_a_finite_likelihood():
    probabilities = np.array([[1.0, 0.0]], np.float32)
    value = metrics.negative_log_likelihood(probabilities, np.array([1]))
    assert value == pytest.approx(-math.log(np.finfo(np.float32).tiny))


def test_no_examples_give_nan():
    none, labels = np.zeros((0, 3)), np.zeros(0, int)
    assert math.isnan(metrics.accuracy(none, labels))
    assert math.isnan(metrics.expected_calibration_error(none, labels))
    assert math.isnan(metrics.negative_log_likelihood(none, labels))
    assert math.isnan(metrics.macro_f1(labels, labels, num_classes=3))


def test_an_ignored_label_is_not_counted():
    truth, predicted = np.array([[0, 255], [1, 1]]), np.array([[0, 1], [1, 0]])
    found = metrics.confusion_matrix(truth, predicted, num_classes=2, ignore=255)
    np.testing.assert_array_equal(found, [[1, 0], [1, 1]])


def test_wrong_arguments_are_named():
    probabilities, labels = examples()
    with pytest.raises(ValueError, match="classes from 0 to 6, got 7"):
        metrics.accuracy(probabilities, labels + 1 * (labels == 6))
    with pytest.raises(ValueError, match="classes from 0 to 1, got 255"):
        metrics.confusion_matrix(np.array([255]), np.array([0]), num_classes=2)
    with pytest.raises(TypeError, match="labels must be integers, got float64"):
        metrics.accuracy(probabilities, labels.astype(float))
    with pytest.raises(ValueError, match="apply a softmax to logits first"):
        metrics.expected_calibration_error(4 * probabilities, labels)
    with pytest.raises(ValueError, match="probabilities must be floats, got int64"):
        metrics.negative_log_likelihood(np.eye(3, dtype=int), np.arange(3))
    with pytest.raises(ValueError, match="scores of example 3 are not numbers"):
        probabilities[3, 2] = math.nan
        metrics.accuracy(probabilities, labels)
    with pytest.raises(ValueError, match=r"got \(200, 7\) and \(199,\)"):
        metrics.accuracy(probabilities, labels[:-1])
    with pytest.raises(ValueError, match=r"truth has shape \(2,\)"):
        metrics.confusion_matrix(np.arange(2), np.arange(3), num_classes=3)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        metrics.top_k_accuracy(probabilities, labels, k=0)
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        metrics.expected_calibration_error(*examples(), bins=0)
