import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.layers import Outputs


def arrays(run):
    return run.student.logits, run.teacher.logits, run.batch["label"]


def test_dkd_has_a_term_and_a_weight_per_part(classification):
    method = distill.create("dkd", alpha=0.5, beta=2.0, warmup_epochs=0)
    assert method.weights == {"tckd": 0.5, "nckd": 2.0}
    terms = classification.terms(method)
    np.testing.assert_allclose(
        0.5 * terms["tckd"] + 2.0 * terms["nckd"],
        losses.dkd(*arrays(classification), alpha=0.5, beta=2.0),
        rtol=1e-6,
    )


@pytest.mark.parametrize(("step", "growth"), [(0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)])
def test_dkd_grows_over_the_warm_up(classification, step, growth):
    """One step per epoch here; the first epoch has 1/4 and not 0."""
    terms = classification.terms(distill.create("dkd", warmup_epochs=4), step=step)
    full = classification.terms(distill.create("dkd", warmup_epochs=0))
    for name, value in terms.items():
        np.testing.assert_allclose(value, growth * full[name], rtol=1e-6)


def test_nkd_has_a_term_and_a_weight_per_part(classification):
    method = distill.create("nkd", gamma=3.5, temperature=lambda step: 1.0 + step)
    assert method.weights == {"target": 1.0, "nontarget": 3.5}
    terms = classification.terms(method, step=2)
    np.testing.assert_allclose(
        terms["target"] + 3.5 * terms["nontarget"],
        losses.nkd(*arrays(classification), gamma=3.5, temperature=3.0),
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_the_largest_share_of_a_mixed_image_is_the_target(classification, name):
    method = distill.create(name)
    target = 0.6 * jnp.eye(5)[classification.batch["label"]] + 0.08
    mixed = dataclasses.replace(
        classification, batch={"label": jnp.array([1, 1]), "target": target}
    )
    for a, b in zip(
        mixed.terms(method).values(),
        classification.terms(method).values(),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_pixels_are_examples(segmentation, name):
    terms = segmentation.terms(distill.create(name))
    assert {v.shape for v in terms.values()} == {(2, 32, 32)}


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_impossible_options_and_networks_are_one_line(classification, name):
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        distill.create(name, temperature=0.0)
    logits = classification.teacher.logits.repeat(2, axis=1)
    other = dataclasses.replace(
        classification, teachers=(Outputs(logits=logits, taps={}),)
    )
    with pytest.raises(ValueError, match="have 10 classes and student logits 5; give"):
        other.init(distill.create(name))


def test_the_warm_up_is_not_negative():
    with pytest.raises(ValueError, match="warmup_epochs must be >= 0, got -1"):
        distill.create("dkd", warmup_epochs=-1)
