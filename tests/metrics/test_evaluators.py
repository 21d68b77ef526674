"""Evaluators give the numbers of the whole data set, whatever the batches."""

import math

import numpy as np
import pytest

from jaxkd import metrics

GROUPS = ["a", "a", "b", "b", "c", "d"]


def one_hot_probabilities(predicted, classes):
    return np.eye(classes)[predicted] * 0.8 + 0.2 / classes


def slices(classes=2, n=6, size=12, seed=0):
    """Labels and noisy probabilities; the last record is empty in both."""
    generator = np.random.default_rng(seed)
    label = generator.integers(classes, size=(n, size, size))
    predicted = np.where(
        generator.random(label.shape) < 0.7, label, generator.integers(classes)
    )
    label[-1] = predicted[-1] = 0
    return label.astype(np.int32), one_hot_probabilities(predicted, classes)


def evaluator(classes=2, **options):
    names = ["background", "liver", "tumour", "vessel"][:classes]
    return metrics.SegmentationEvaluator(
        num_classes=classes, class_names=names, groups=GROUPS, **options
    )


def feed(target, index, label, probabilities, batches):
    for rows in batches:
        target.update(
            index=index[rows], label=label[rows], probabilities=probabilities[rows]
        )
    return target


def whole(n):
    return [slice(0, n)]


def test_segmentation_scores_equal_the_functions_on_pooled_cases():
    label, probabilities = slices()
    result = feed(evaluator(), np.arange(6), label, probabilities, whole(6)).result()
    pred, truth = probabilities[..., 1] > 0.5, label == 1
    cases = [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 6)]
    for name, function in (("dice", metrics.dice), ("iou", metrics.iou)):
        expected = np.mean([function(pred[c], truth[c]) for c in cases])
        assert result[name] == pytest.approx(expected)
    assert result["ravd"] == pytest.approx(
        np.mean([metrics.ravd(pred[c], truth[c]) for c in cases[:3]])
    )
    assert result["ravd_undefined"] == 1
    for name, function in (("hd95", metrics.hd95), ("assd", metrics.assd)):
        expected = np.mean([function(pred[i], truth[i]) for i in range(5)])
        assert result[name] == pytest.approx(expected)
    assert result["hd95_undefined"] == 1


@pytest.mark.parametrize("classes", [2, 3])
def test_segmentation_result_does_not_depend_on_the_batches(classes):
    label, probabilities = slices(classes)
    order = np.array([4, 0, 5, 2, 1, 3])
    once = feed(
        evaluator(classes), np.arange(6), label, probabilities, whole(6)
    ).result()
    uneven = [order[:1], order[1:5], order[5:]]
    again = feed(
        evaluator(classes), np.arange(6), label, probabilities, uneven
    ).result()
    assert once.keys() == again.keys()
    for name, value in once.items():
        assert again[name] == pytest.approx(value), name


def test_more_classes_are_averaged_and_listed_by_name():
    label, probabilities = slices(3)
    result = feed(evaluator(3), np.arange(6), label, probabilities, whole(6)).result()
    predicted = probabilities.argmax(-1)
    cases = [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 6)]
    for c, name in ((1, "liver"), (2, "tumour")):
        expected = np.mean(
            [metrics.dice(predicted[rows] == c, label[rows] == c) for rows in cases]
        )
        assert result[f"dice/{name}"] == pytest.approx(expected)
    mean = (result["dice/liver"] + result["dice/tumour"]) / 2
    assert result["dice"] == pytest.approx(mean)
    assert "dice/background" not in result


def test_two_classes_use_the_threshold_and_more_the_arg_max():
    probabilities = np.array([[[[0.55, 0.45], [0.7, 0.3]]]])
    label = np.array([[[1, 0]]])
    for threshold, expected in ((0.4, 1.0), (0.5, 0.0)):
        low = evaluator(threshold=threshold)
        low.update(index=np.array([0]), label=label, probabilities=probabilities)
        assert low.result()["dice"] == expected
    three = np.array([[[[0.3, 0.45, 0.25]]]])
    assert evaluator(3, threshold=0.9).predict(three).item() == 1


def test_surfaces_can_be_left_out_and_measured_in_millimetres():
    label, probabilities = slices()
    fed = feed(evaluator(), np.arange(6), label, probabilities, whole(6))
    quick = fed.result(surface=False)
    assert set(quick) == {"dice", "iou", "ravd", "ravd_undefined"}
    assert quick["dice"] == fed.result()["dice"]
    wide = feed(evaluator(spacing=2.5), np.arange(6), label, probabilities, whole(6))
    assert wide.result()["assd"] == pytest.approx(2.5 * fed.result()["assd"])


def test_empty_slices_count_as_undefined_and_as_agreement():
    empty = np.zeros((2, 5, 5), np.int32)
    nothing = one_hot_probabilities(empty, 2)
    result = feed(evaluator(), np.array([4, 5]), empty, nothing, whole(2)).result()
    assert result["dice"] == result["iou"] == 1
    assert math.isnan(result["hd95"]) and math.isnan(result["assd"])
    assert math.isnan(result["ravd"])
    assert result["hd95_undefined"] == result["ravd_undefined"] == 2


def test_segmentation_evaluator_names_what_is_wrong():
    label, probabilities = slices()
    fed = feed(evaluator(), np.arange(6), label, probabilities, whole(3))
    with pytest.raises(ValueError, match="record 2 was passed twice"):
        feed(fed, np.arange(6), label, probabilities, [slice(2, 4)])
    with pytest.raises(ValueError, match="nothing was evaluated"):
        evaluator().result()
    with pytest.raises(ValueError, match="record 6 is not in a source of 6"):
        feed(evaluator(), np.arange(1, 7), label, probabilities, whole(6))
    with pytest.raises(ValueError, match=r"\[batch, height, width, 2\], got"):
        feed(evaluator(), np.arange(6), label, probabilities[..., :1], whole(6))
    with pytest.raises(ValueError, match="label must be classes from 0 to 1, got 255"):
        feed(evaluator(), np.arange(6), label * 255, probabilities, whole(6))
    with pytest.raises(ValueError, match="6 rows needs as many indices"):
        evaluator().update(index=np.arange(5), label=label, probabilities=probabilities)
    with pytest.raises(TypeError, match="index must be integers, got float64"):
        feed(evaluator(), np.arange(6.0), label, probabilities, whole(6))
    probabilities[4, 0, 0] = math.inf
    with pytest.raises(ValueError, match="probabilities of record 4 are not finite"):
        feed(evaluator(), np.arange(6), label, probabilities, whole(6))


def test_a_refused_batch_leaves_no_trace():
    label, probabilities = slices()
    fed = feed(evaluator(), np.arange(6), label, probabilities, whole(2))
    with pytest.raises(ValueError, match="twice"):
        feed(fed, np.array([2, 3, 3, 4]), label[:4], probabilities[:4], whole(4))
    feed(fed, np.arange(6), label, probabilities, [slice(2, 6)])
    whole_at_once = feed(evaluator(), np.arange(6), label, probabilities, whole(6))
    assert fed.result() == whole_at_once.result()


def test_evaluators_check_their_options():
    with pytest.raises(ValueError, match="at least 2 classes"):
        evaluator(1)
    with pytest.raises(ValueError, match="threshold must lie between 0 and 1, got 1"):
        evaluator(threshold=1.0)
    with pytest.raises(ValueError, match="3 classes need as many names, got 2: x, y"):
        metrics.ClassificationEvaluator(num_classes=3, class_names=["x", "y"])
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        metrics.ClassificationEvaluator(num_classes=1, class_names=["x"])


def classification(classes=7, n=60):
    generator = np.random.default_rng(3)
    logits = 2 * generator.normal(size=(n, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    label = np.where(
        generator.random(n) < 0.5, logits.argmax(1), generator.integers(classes, size=n)
    )
    return label, probabilities


def class_evaluator(classes=7):
    names = [f"class {i}" for i in range(classes)]
    return metrics.ClassificationEvaluator(num_classes=classes, class_names=names)


def test_classification_scores_equal_the_functions_for_any_batches():
    label, probabilities = classification()
    batches = [slice(0, 1), slice(1, 40), slice(40, 60)]
    fed = feed(class_evaluator(), np.arange(60), label, probabilities, batches)
    predicted = probabilities.argmax(1)
    assert fed.result() == pytest.approx(
        {
            "accuracy": metrics.accuracy(probabilities, label),
            "top5": metrics.top_k_accuracy(probabilities, label, k=5),
            "macro_f1": metrics.macro_f1(label, predicted, num_classes=7),
            "ece": metrics.expected_calibration_error(probabilities, label),
            "nll": metrics.negative_log_likelihood(probabilities, label),
        }
    )
    np.testing.assert_array_equal(
        fed.confusion(), metrics.confusion_matrix(label, predicted, num_classes=7)
    )


@pytest.mark.parametrize(("classes", "expected"), [(5, False), (6, True)])
def test_top5_is_left_out_where_it_says_nothing(classes, expected):
    label, probabilities = classification(classes)
    fed = feed(class_evaluator(classes), np.arange(60), label, probabilities, whole(60))
    assert ("top5" in fed.result()) is expected


def test_classification_evaluator_names_what_is_wrong():
    label, probabilities = classification()
    fed = feed(class_evaluator(), np.arange(60), label, probabilities, whole(5))
    with pytest.raises(ValueError, match="record 0 was passed twice"):
        feed(fed, np.arange(60), label, probabilities, whole(5))
    with pytest.raises(ValueError, match="nothing was evaluated"):
        class_evaluator().result()
    with pytest.raises(ValueError, match="nothing was evaluated"):
        class_evaluator().confusion()
    with pytest.raises(ValueError, match="apply a softmax to logits first"):
        feed(class_evaluator(), np.arange(60), label, 3 * probabilities, whole(60))
    label, probabilities = classification(6)
    with pytest.raises(ValueError, match="probabilities have 6 classes, expected 7"):
        feed(class_evaluator(), np.arange(60), label, probabilities, whole(60))
