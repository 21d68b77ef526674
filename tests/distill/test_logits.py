import dataclasses

import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.layers import Outputs


def test_kd_compares_classes_and_pixels(classification, segmentation):
    method = distill.create("kd", temperature=3.0)
    for run in (classification, segmentation):
        value = run.terms(method)["kd"]
        expected = losses.kd(run.student.logits, run.teacher.logits, temperature=3.0)
        np.testing.assert_array_equal(value, expected)


def test_kd_has_no_state(classification):
    assert classification.init(distill.create("kd")) == ({}, {})


def test_kd_names_the_classes_that_disagree(classification):
    logits = classification.teacher.logits.repeat(2, axis=1)
    other = dataclasses.replace(
        classification, teachers=(Outputs(logits=logits, taps={}),)
    )
    with pytest.raises(ValueError, match="have 10 classes and student logits 5; give"):
        other.init(distill.create("kd"))


def test_kd_names_maps_of_other_sizes(segmentation):
    small = segmentation.teacher.logits[:, ::2, ::2]
    other = dataclasses.replace(
        segmentation, teachers=(Outputs(logits=small, taps={}),)
    )
    with pytest.raises(ValueError, match=r"logits of shape \(16, 16, 2\)"):
        other.init(distill.create("kd"))


def test_kd_needs_a_teacher(classification):
    alone = dataclasses.replace(classification, teachers=())
    with pytest.raises(ValueError, match="the method needs a teacher"):
        alone.init(distill.create("kd"))


def test_kd_needs_a_temperature():
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        distill.create("kd", temperature=0.0)
