"""Segmentation metrics by hand and brute force; tests/golden has others' values."""

import itertools
import math

import numpy as np
import pytest

from jaxkd import metrics
from jaxkd.metrics import segmentation


def blobs(seed, shape=(9, 11), share=0.3):
    generator = np.random.default_rng(seed)
    return generator.random(shape) < share, generator.random(shape) < share


def brute_surface(mask):
    """Voxels with a face neighbour that is background or outside, one by one."""
    result = np.zeros_like(mask)
    for place in np.ndindex(mask.shape):
        for axis, move in itertools.product(range(mask.ndim), (-1, 1)):
            near = list(place)
            near[axis] += move
            outside = not 0 <= near[axis] < mask.shape[axis]
            if mask[place] and (outside or not mask[tuple(near)]):
                result[place] = True
    return result


def brute_distances(pred, truth, spacing):
    a, b = (np.argwhere(brute_surface(m)) * np.asarray(spacing) for m in (pred, truth))
    table = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    return table.min(axis=1), table.min(axis=0)


def test_overlaps_by_hand():
    # 3 predicted, 4 true, 2 in both.
    pred, truth = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
    assert metrics.dice(pred, truth) == pytest.approx(4 / 7)
    assert metrics.iou(pred, truth) == pytest.approx(2 / 5)
    assert metrics.precision(pred, truth) == pytest.approx(2 / 3)
    assert metrics.recall(pred, truth) == pytest.approx(1 / 2)
    assert metrics.ravd(pred, truth) == pytest.approx(-1 / 4)


def test_the_two_definitions_of_hd95_differ_where_one_side_is_far():
    # Lines of 100 and 106 pixels: one way all distances are 0, the other way the last
    # are 1 to 6. Those 6 are above the 95th percentile of 106 values, not of 206.
    pred, truth = np.arange(120) < 100, np.arange(120) < 106
    assert metrics.hd95(pred[None], truth[None]) == 0
    assert metrics.hd95(pred[None], truth[None], pooling="max") == pytest.approx(0.75)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 2.5)])
def test_surface_distances_equal_brute_force(seed, spacing):
    pred, truth = blobs(seed)
    expected = brute_distances(pred, truth, spacing)
    actual = metrics.surface_distances(pred, truth, spacing=spacing)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12)
    assert metrics.asd(pred, truth, spacing=spacing) == pytest.approx(
        expected[0].mean()
    )


@pytest.mark.parametrize("shape", [(30,), (8, 9), (5, 6, 7), (3, 4, 4, 3)])
def test_masks_may_have_any_rank(shape):
    pred, truth = blobs(1, shape)
    expected = np.concatenate(brute_distances(pred, truth, (1.0,) * len(shape)))
    assert metrics.hausdorff(pred, truth) == pytest.approx(expected.max())
    assert metrics.assd(pred, truth) == pytest.approx(expected.mean())
    overlap, total = (pred & truth).sum(), pred.sum() + truth.sum()
    assert metrics.dice(pred, truth) == pytest.approx(2 * overlap / total)


def test_a_mask_at_the_image_border_has_a_surface_there():
    full = np.ones((4, 5), bool)
    assert segmentation.surface(full).sum() == 14
    np.testing.assert_array_equal(segmentation.surface(full), brute_surface(full))


def test_background_around_the_masks_changes_nothing():
    pred, truth = blobs(2)
    wide_pred, wide_truth = (np.pad(m, ((3, 0), (1, 6))) for m in (pred, truth))
    for function in (metrics.hd95, metrics.assd, metrics.dice, metrics.iou):
        assert function(pred, truth) == function(wide_pred, wide_truth)


def test_metrics_are_perfect_for_equal_masks():
    mask, _ = blobs(3)
    assert metrics.dice(mask, mask) == metrics.iou(mask, mask) == 1
    assert metrics.ravd(mask, mask) == metrics.hd95(mask, mask) == 0
    assert metrics.assd(mask, mask) == metrics.hausdorff(mask, mask) == 0


@pytest.mark.parametrize(
    "function", [metrics.dice, metrics.iou, metrics.hausdorff, metrics.assd]
)
def test_symmetric_metrics_do_not_mind_the_order(function):
    pred, truth = blobs(4)
    assert function(pred, truth) == function(truth, pred)


def test_dice_and_iou_are_functions_of_each_other():
    pred, truth = blobs(5)
    overlap = metrics.iou(pred, truth)
    assert metrics.dice(pred, truth) == pytest.approx(2 * overlap / (1 + overlap))


def test_one_number_as_spacing_scales_every_axis():
    pred, truth = blobs(6)
    doubled = metrics.assd(pred, truth, spacing=2)
    assert doubled == pytest.approx(2 * metrics.assd(pred, truth))


EMPTY, FULL = np.zeros((6, 6), bool), np.eye(6, dtype=bool)


@pytest.mark.parametrize(
    ("pred", "truth", "overlap", "volume"),
    [(EMPTY, EMPTY, 1.0, None), (EMPTY, FULL, 0.0, -1.0), (FULL, EMPTY, 0.0, None)],
)
def test_empty_masks_follow_the_rules(pred, truth, overlap, volume):
    assert metrics.dice(pred, truth) == overlap
    assert metrics.iou(pred, truth) == overlap
    for function in (metrics.hd95, metrics.hausdorff, metrics.assd, metrics.asd):
        assert math.isnan(function(pred, truth))
    value = metrics.ravd(pred, truth)
    assert math.isnan(value) if volume is None else value == volume
    assert math.isnan(metrics.recall(FULL, EMPTY))
    assert math.isnan(metrics.precision(EMPTY, FULL))


def test_masks_that_are_not_boolean_are_refused():
    with pytest.raises(TypeError, match="pred must be a boolean mask, got float32"):
        metrics.dice(np.zeros((2, 2), np.float32), EMPTY[:2, :2])
    with pytest.raises(TypeError, match="truth must be a boolean mask, got uint8"):
        metrics.assd(EMPTY, EMPTY.astype(np.uint8))


def test_shapes_spacing_and_pooling_are_checked():
    with pytest.raises(ValueError, match=r"pred has shape \(6, 6\) and truth \(6,\)"):
        metrics.iou(FULL, FULL[0])
    with pytest.raises(ValueError, match="spacing has 3 values for masks of rank 2"):
        metrics.hd95(FULL, FULL, spacing=(1, 1, 1))
    with pytest.raises(ValueError, match="spacing must be positive"):
        metrics.assd(FULL, FULL, spacing=(1, 0))
    # The tests' run-time type checks refuse an unknown name before the function does.
    with pytest.raises((ValueError, TypeError), match="pooling"):
        metrics.hd95(FULL, FULL, pooling="no")
    with pytest.raises(ValueError, match="rank 1 or more"):
        metrics.assd(np.array(True), np.array(True))


def test_class_iou_by_hand_skips_absent_classes():
    # Class 2 is absent from the truth, but was predicted twice.
    confusion = np.array([[3, 1, 0], [1, 2, 2], [0, 0, 0]])
    np.testing.assert_allclose(metrics.class_iou(confusion), [3 / 5, 1 / 3, 0])
    assert metrics.mean_iou(confusion) == pytest.approx((3 / 5 + 1 / 3) / 3)
    confusion[:, 2] = 0
    assert math.isnan(metrics.class_iou(confusion)[2])
    assert metrics.mean_iou(np.diag([3, 2, 0])) == 1
    assert math.isnan(metrics.mean_iou(np.zeros((2, 2))))


def test_hlfd_scores_pool_the_slices_of_a_case():
    # Case a: P=3, G=4, I=2 over two slices; case b: P=2, G=1, I=1; case c: no truth.
    truth = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    high = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    probabilities = np.where(high, 0.41, 0.39)[:, None]
    scores = metrics.hlfd_scores(probabilities, truth[:, None], ["a", "a", "b", "c"])
    assert scores["dice"] == pytest.approx((5 / 8 + 3 / 4) / 2)
    assert scores["voe"] == pytest.approx((2 / 7 + 2 / 3) / 2)
    assert scores["rvd"] == pytest.approx((-1 / 4 + 1) / 2)


def test_hlfd_scores_offer_the_textbook_error_and_any_threshold():
    truth = np.array([[[True, True, False]]])
    probabilities = np.array([[[0.6, 0.45, 0.45]]])
    code = metrics.hlfd_scores(probabilities, truth, [0])
    strict = metrics.hlfd_scores(
        probabilities, truth, np.array([0]), threshold=0.5, voe="textbook"
    )
    assert code["dice"] == pytest.approx(5 / 6)
    assert strict["dice"] == pytest.approx(3 / 4)
    assert strict["voe"] == pytest.approx(1 / 2)


def test_hlfd_scores_without_any_foreground_are_undefined():
    scores = metrics.hlfd_scores(np.ones((2, 3, 3)), np.zeros((2, 3, 3), bool), [0, 1])
    assert all(math.isnan(v) for v in scores.values())


def test_hlfd_scores_check_their_arguments():
    probabilities, truth = np.ones((2, 3, 3)), np.zeros((2, 3, 3), bool)
    with pytest.raises(ValueError, match="2 slices need as many cases, got 1"):
        metrics.hlfd_scores(probabilities, truth, [0])
    with pytest.raises((ValueError, TypeError), match="voe"):
        metrics.hlfd_scores(probabilities, truth, [0, 1], voe="paper")
    with pytest.raises(TypeError, match="truth must be a boolean mask"):
        metrics.hlfd_scores(probabilities, truth.astype(int), [0, 1])
