import dataclasses

import numpy as np
import pytest

from jaxkd import distill, losses


def test_ifvd_equals_its_loss(segmentation):
    method = distill.create("ifvd", student_tap="d3", teacher_tap="d3")
    label = segmentation.batch["label"].at[0, :5].set(255)
    run = dataclasses.replace(segmentation, batch={"label": label})
    expected = losses.ifvd(
        run.student.taps["d3"], run.teacher.taps["d3"], label, num_classes=2
    )
    np.testing.assert_array_equal(run.terms(method)["ifvd"], expected)
    assert method.weights == {"ifvd": 200.0}


def test_ifvd_errors_are_one_line(segmentation, classification):
    with pytest.raises(ValueError, match=r"32x32 .* is 16x16; set student_tap and"):
        segmentation.init(distill.create("ifvd"))
    with pytest.raises(ValueError, match="method 'ifvd' needs logits"):
        classification.init(distill.create("ifvd"))
