import dataclasses

import jax.numpy as jnp
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


def test_kd_cross_entropy_is_its_loss(classification):
    method = distill.create("kd_cross_entropy", temperature=3.0)
    expected = losses.kd_cross_entropy(
        classification.student.logits, classification.teacher.logits, temperature=3.0
    )
    value = classification.terms(method)["kd_cross_entropy"]
    np.testing.assert_array_equal(value, expected)


def test_wsld_carries_its_factor_and_reads_mixed_labels(classification):
    method = distill.create("wsld", alpha=2.25)
    assert method.weights == {"wsld": 2.25}
    mixed = jnp.array([[0.0, 0.3, 0.0, 0.7, 0.0], [0.5, 0.0, 0.5, 0.0, 0.0]])
    for target in (classification.batch["label"], mixed):
        batch = classification.batch | ({"target": mixed} if target.ndim == 2 else {})
        run = dataclasses.replace(classification, batch=batch)
        expected = losses.wsld(run.student.logits, run.teacher.logits, target)
        np.testing.assert_array_equal(run.terms(method)["wsld"], expected)


@pytest.mark.parametrize("base", ["kd", "dkd"])
def test_logit_standardization_is_its_base_on_z_scores(classification, base):
    method = distill.create(
        "logit_standardization", base=base, temperature=lambda step: 2.0 + step, beta=2
    )
    assert method.weights == {"logit_standardization": 9.0}
    student, teacher = (
        losses.standardize_logits(outputs.logits)
        for outputs in (classification.student, classification.teacher)
    )
    if base == "kd":
        expected = losses.kd(student, teacher, temperature=3.0)
    else:
        labels = classification.batch["label"]
        # Step 1 is in the second of ten epochs; DKD grows over twenty.
        expected = 0.1 * losses.dkd(student, teacher, labels, beta=2.0, temperature=3.0)
    value = classification.terms(method, step=1)["logit_standardization"]
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["kd_cross_entropy", "wsld", "logit_standardization"])
def test_logit_methods_check_their_options_and_networks(classification, name):
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        distill.create(name, temperature=0.0)
    logits = classification.teacher.logits.repeat(2, axis=1)
    other = dataclasses.replace(
        classification, teachers=(Outputs(logits=logits, taps={}),)
    )
    with pytest.raises(ValueError, match="have 10 classes and student logits 5; give"):
        other.init(distill.create(name))


def test_logit_standardization_needs_a_known_base_and_a_positive_eps():
    with pytest.raises(TypeError, match="'base' must be one of 'kd', 'dkd'"):
        distill.create("logit_standardization", base="nkd")
    with pytest.raises(ValueError, match="eps must be > 0"):
        distill.create("logit_standardization", eps=0.0)
