import numpy as np
import pytest

from jaxkd import distill, losses


def test_cwd_compares_logits(segmentation):
    method = distill.create("cwd", temperature=lambda step: 1.0 + step)
    value = segmentation.terms(method, step=2)["cwd"]
    logits = segmentation.student.logits, segmentation.teacher.logits
    np.testing.assert_array_equal(value, losses.cwd(*logits, temperature=3.0))
    assert method.weights == {"cwd": 3.0}
    assert segmentation.init(method) == ({}, {})


def test_cwd_carries_features_to_the_teachers_channels(segmentation):
    method = distill.create("cwd", student_tap="e3", teacher_tap="e4")
    params, memory = segmentation.init(method)
    assert params["kernel"].shape == (4, 6)
    value = segmentation.terms(method, state=(params, memory))["cwd"]
    student = segmentation.student.taps["e3"] @ params["kernel"]
    expected = losses.cwd(student, segmentation.teacher.taps["e4"])
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_cwd_compares_features_of_equal_width_as_they_are(segmentation):
    method = distill.create("cwd", student_tap="d3", teacher_tap="d3")
    assert segmentation.init(method) == ({}, {})
    expected = losses.cwd(
        segmentation.student.taps["d3"], segmentation.teacher.taps["d3"]
    )
    value = segmentation.terms(method)["cwd"]
    np.testing.assert_array_equal(value, expected)


def test_cwd_errors_are_one_line(segmentation, classification):
    with pytest.raises(ValueError, match="name both student_tap and teacher_tap"):
        distill.create("cwd", student_tap="e3")
    with pytest.raises(ValueError, match="temperature must be > 0"):
        distill.create("cwd", temperature=0.0)
    with pytest.raises(ValueError, match="method 'cwd' needs logits"):
        classification.init(distill.create("cwd"))
    method = distill.create("cwd", student_tap="e4", teacher_tap="e3")
    message = "'e4' of student 'student' is 2x2 and tap 'e3' of teacher 'teacher' is 16"
    with pytest.raises(ValueError, match=message):
        segmentation.init(method)
    with pytest.raises(KeyError, match="has no tap 'x'"):
        segmentation.init(distill.create("cwd", student_tap="x", teacher_tap="e3"))
