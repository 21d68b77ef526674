"""Outlines are exact, regions are counted right, and pictures keep their pixels."""

import base64
import io
import re

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from PIL import Image

from jaxkd import metrics
from jaxkd.report import pictures


def blob(seed, shape=(14, 17)):
    return np.random.default_rng(seed).random(shape) < 0.45


def filled(path, shape):
    """The pixels whose centres a path encloses by the even-odd rule."""
    rows, columns = np.indices(shape)
    centres = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], axis=1)
    inside = np.zeros(len(centres), int)
    for part in filter(None, path.replace("Z", "").split("M")):
        points = [tuple(map(float, p.split())) for p in part.split("L")]
        inside += Outline([*points, points[0]]).contains_points(centres)
    return (inside % 2 == 1).reshape(shape)


def decode(uri):
    kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", uri).groups()
    return kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("seed", range(5))
def test_a_path_encloses_exactly_the_mask(seed):
    mask = blob(seed)
    np.testing.assert_array_equal(filled(pictures.region_path(mask), mask.shape), mask)


def test_a_path_encloses_masks_with_holes_and_at_the_border():
    mask = np.ones((7, 7), bool)
    mask[2:5, 2:5] = False
    mask[3, 3] = True
    np.testing.assert_array_equal(filled(pictures.region_path(mask), mask.shape), mask)


def test_a_path_has_no_points_on_straight_lines():
    # A rectangle with cut corners has eight corners, however large it is.
    mask = np.zeros((20, 20), bool)
    mask[3:17, 2:9] = True
    assert pictures.region_path(mask).count("L") == 7
    assert pictures.region_path(np.zeros((4, 4), bool)) == ""


def test_an_overlay_counts_every_pixel_once():
    truth = np.array([[0, 1, 1, 2], [0, 1, 2, 2]])
    pred = np.array([[1, 1, 0, 2], [0, 2, 2, 0]])
    found = pictures.overlay(pred, truth)
    assert found.pixels == (3, 1, 2, 1)
    assert found.text == (
        "3 pixels right, 1 false positive, 2 missed, 1 of a wrong class"
    )
    for path, region in (
        (found.right, (truth > 0) & (pred == truth)),
        (found.invented, (pred > 0) & (truth == 0)),
        (found.missed, (pred == 0) & (truth > 0)),
        (found.confused, (pred > 0) & (truth > 0) & (pred != truth)),
    ):
        np.testing.assert_array_equal(filled(path, truth.shape), region)


def test_the_dice_of_a_slice_is_the_metric():
    truth, pred = blob(1), blob(2)
    score = pictures.slice_dice(pred.astype(int), truth.astype(int))
    assert score == metrics.dice(pred, truth)
    assert pictures.overlay(pred.astype(int), truth.astype(int)).dice == score


def test_the_dice_of_several_classes_is_the_mean_over_those_present():
    truth, pred = np.array([[1, 1, 2, 0]]), np.array([[1, 0, 0, 0]])
    assert pictures.slice_dice(pred, truth) == pytest.approx((2 / 3 + 0) / 2)
    empty = np.zeros((1, 4), int)
    assert pictures.slice_dice(empty, empty) == 1


def test_best_median_and_worst_are_picked_in_order():
    scores = np.linspace(0, 1, 21)
    picks = pictures.pick_by_score(scores.tolist(), per_group=3)
    assert [pick.row for pick in picks] == [20, 19, 18, 11, 10, 9, 2, 1, 0]
    assert [pick.group for pick in picks] == ["best"] * 3 + ["median"] * 3 + [
        "worst"
    ] * 3


@pytest.mark.parametrize("n", [0, 1, 5, 9])
def test_few_records_are_all_shown_once(n):
    picks = pictures.pick_by_score(list(range(n)), per_group=3)
    assert [pick.row for pick in picks] == list(range(n))[::-1]
    assert {pick.group for pick in picks} <= {"all"}


@pytest.mark.parametrize("place", [(5, 5), (100, 60), (195, 140)])
def test_a_window_holds_a_small_target_and_keeps_proportions(place):
    mask = np.zeros((200, 150), bool)
    mask[place[0] - 4 : place[0] + 4, place[1] - 3 : place[1] + 3] = True
    left, top, width, height = pictures.window([mask, np.zeros_like(mask)])
    assert (height, width) == (50, 38)
    assert 0 <= left <= 150 - width and 0 <= top <= 200 - height
    assert mask[top : top + height, left : left + width].sum() == mask.sum()


def test_a_large_target_or_none_shows_the_whole_slice():
    mask = np.zeros((64, 64), bool)
    assert pictures.window([mask]) == (0, 0, 64, 64)
    mask[10:50, 20:30] = True
    assert pictures.window([mask]) == (0, 0, 64, 64)


def test_grey_and_small_pictures_keep_every_pixel():
    generator = np.random.default_rng(0)
    for shape in ((40, 30), (32, 32, 3)):
        image = generator.integers(0, 256, size=shape, dtype=np.uint8)
        kind, found = decode(pictures.picture_uri(image))
        assert kind == "png"
        np.testing.assert_array_equal(found, image)


def test_large_pictures_shrink_and_colour_is_compressed():
    image = np.full((300, 600, 3), (200, 100, 50), np.uint8)
    kind, found = decode(pictures.picture_uri(image))
    assert kind == "jpeg" and found.shape == (128, 256, 3)
    assert np.abs(found.astype(int) - (200, 100, 50)).max() <= 3
    assert decode(pictures.picture_uri(image[..., 0]))[1].shape == (128, 256)


def test_a_heat_map_grows_more_opaque_with_the_value():
    shares = np.array([[0.0, 0.25], [1.0, 4.0]])
    kind, found = decode(pictures.heat_map_uri(shares, colour=(1, 2, 3)))
    assert kind == "png" and found.shape == (480, 480, 4)
    assert found[::240, ::240, 3].tolist() == [[0, 128], [255, 255]]
    assert (found[..., :3] == (1, 2, 3)).all()
