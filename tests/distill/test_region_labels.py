"""FKD on stored labels, and on a live teacher that stands in for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.numerics import compress_labels, recover_labels

TARGET = jnp.array([[0.1, 0.2, 0.3, 0.4, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])


@pytest.fixture
def stored(classification):
    """A student alone, in whose batch the soft labels are."""
    batch = {**classification.batch, "target": TARGET}
    return dataclasses.replace(classification, teachers=(), batch=batch)


def test_fkd_is_cross_entropy_with_the_stored_labels(stored):
    method = distill.create("fkd")
    assert method.num_teachers == 0 and method.weights == {"fkd": 1.0}
    assert stored.init(method) == ({}, {})
    expected = losses.cross_entropy(stored.student.logits, TARGET)
    np.testing.assert_allclose(stored.terms(method)["fkd"], expected, rtol=1e-6)


def test_the_temperature_is_the_students_and_may_be_a_schedule(stored):
    method = distill.create("fkd", temperature=lambda step: 1.0 + step)
    value = stored.terms(method, step=3)["fkd"]
    expected = losses.cross_entropy(stored.student.logits / 4.0, TARGET)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_a_live_teacher_says_what_stored_labels_would_hold(classification):
    method = distill.create(
        "fkd", labels="teacher", label_format="marginal_smoothing_k2"
    )
    assert method.num_teachers == 1
    index, probability = compress_labels(
        jax.nn.softmax(classification.teacher.logits),
        label_format="marginal_smoothing_k2",
    )
    target = recover_labels(
        index, probability, label_format="marginal_smoothing_k2", num_classes=5
    )
    expected = losses.cross_entropy(classification.student.logits, target)
    value = classification.terms(method)["fkd"]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_fkd_names_what_is_missing(stored, classification, segmentation):
    with pytest.raises(ValueError, match="the batch has no 'target'; train on data"):
        classification.terms(distill.create("fkd"))
    live = distill.create("fkd", labels="teacher")
    with pytest.raises(ValueError, match="at least 6 classes, got 5"):
        classification.init(live)
    with pytest.raises(ValueError, match="the method needs a teacher"):
        stored.init(distill.create("fkd", labels="teacher", label_format="hard"))
    with pytest.raises(ValueError, match="one label per image"):
        segmentation.init(distill.create("fkd"))
    with pytest.raises(ValueError, match="temperature must be > 0"):
        distill.create("fkd", temperature=0.0)
