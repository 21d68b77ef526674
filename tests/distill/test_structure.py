import numpy as np
import pytest

from jaxkd import distill, losses


def test_skd_pixel_equals_its_loss(segmentation):
    method = distill.create("skd_pixel", reduction="mean")
    value = segmentation.terms(method)["skd_pixel"]
    expected = losses.skd_pixel(
        segmentation.student.logits, segmentation.teacher.logits, reduction="mean"
    )
    np.testing.assert_array_equal(value, expected)
    assert method.weights == {"skd_pixel": 10.0}


def test_skd_pair_equals_its_loss(segmentation):
    method = distill.create("skd_pair", student_tap="e2", teacher_tap="e4")
    value = segmentation.terms(method)["skd_pair"]
    expected = losses.skd_pair(
        segmentation.student.taps["e2"], segmentation.teacher.taps["e4"]
    )
    np.testing.assert_array_equal(value, expected)


def test_skd_has_the_published_weights():
    assert distill.create("skd").weights == {
        "skd_pixel": 10.0,
        "skd_pair": 1.0,
        "skd_holistic/student": 0.1,
        "skd_holistic/critic": 0.1,
        "skd_holistic/penalty": 1.0,
    }
    assert list(distill.create("skd").optimizers) == ["skd_holistic/critic"]


def test_errors_are_one_line(segmentation, classification):
    with pytest.raises(ValueError, match="scale must be above 0 and at most 1, got 0"):
        distill.create("skd_pair", scale=0.0)
    with pytest.raises(ValueError, match="maps of 1x1 have no regions at scale 0.5"):
        segmentation.init(distill.create("skd_pair"))
    message = "'e3' of student 'student' is 4x4 and .* is 16x16; at scale 0.4 they have"
    with pytest.raises(ValueError, match=message):
        segmentation.init(
            distill.create("skd_pair", student_tap="e3", teacher_tap="e3", scale=0.4)
        )
    with pytest.raises(ValueError, match="method 'skd_pixel' needs logits"):
        classification.init(distill.create("skd_pixel"))
