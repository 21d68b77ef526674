import dataclasses

import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.layers import Outputs


def test_teachers_add_up(classification, segmentation):
    method = distill.create("function_matching", temperature=lambda step: 1.0 + step)
    for run in (classification, segmentation):
        second = Outputs(logits=run.student.logits * 2, taps={})
        both = dataclasses.replace(run, teachers=(run.teacher, second))
        expected = sum(
            losses.kd(run.student.logits, t.logits, temperature=3.0)
            for t in both.teachers
        )
        value = both.terms(method, step=2)["function_matching"]
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_one_teacher_is_kd(classification):
    value = classification.terms(distill.create("function_matching", temperature=5))
    expected = classification.terms(distill.create("kd", temperature=5))
    np.testing.assert_array_equal(value["function_matching"], expected["kd"])


def test_impossible_options_and_networks_are_one_line(classification):
    method = distill.create("function_matching")
    alone = dataclasses.replace(classification, teachers=())
    with pytest.raises(ValueError, match="the method needs a teacher"):
        alone.init(method)
    other = Outputs(logits=classification.teacher.logits[:, 1:], taps={})
    second = dataclasses.replace(
        classification, teachers=(classification.teacher, other)
    )
    with pytest.raises(ValueError, match="have 4 classes and student logits 5"):
        second.init(method)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        distill.create("function_matching", temperature=0.0)
