import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses


def test_dist_has_a_term_and_a_weight_per_part(classification):
    method = distill.create("dist", beta=2.0, gamma=3.0, temperature=4.0)
    assert method.weights == {"inter": 4.0, "intra": 6.0}
    terms = classification.terms(method)
    expected = losses.dist(
        classification.student.logits,
        classification.teacher.logits,
        beta=4.0,
        gamma=6.0,
        temperature=4.0,
    )
    value = 4.0 * terms["inter"] + 6.0 * terms["intra"]
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_the_factors_of_dist_may_be_schedules(classification):
    method = distill.create("dist", factor=lambda step: 1.0 * step, beta=0.5)
    assert distill.weight_at(method.weights["inter"], jnp.asarray(4)) == 2.0
    assert classification.init(method) == ({}, {})


def test_every_pixel_of_the_batch_is_an_example(segmentation):
    terms = segmentation.terms(distill.create("dist"))
    assert {v.shape for v in terms.values()} == {(2, 32, 32)}
    flat = losses.dist_intra(
        segmentation.student.logits.reshape(-1, 2),
        segmentation.teacher.logits.reshape(-1, 2),
    )
    np.testing.assert_allclose(terms["intra"], flat[0], rtol=1e-5)


def test_a_batch_of_one_image_has_nothing_to_correlate(classification, segmentation):
    def alone(run):
        return dataclasses.replace(
            run, data=dataclasses.replace(run.data, batch_size=1)
        )

    method = distill.create("dist")
    with pytest.raises(ValueError, match="batch_size of at least 2, got 1"):
        alone(classification).init(method)
    assert alone(segmentation).init(method) == ({}, {})


def test_dist_needs_a_temperature():
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        distill.create("dist", temperature=0.0)
