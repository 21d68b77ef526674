"""Cross-entropy with soft labels, and the means of several teachers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxkd import losses


@pytest.fixture
def pair():
    student, teacher = np.random.default_rng(0).standard_normal((2, 4, 6))
    return jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)


def test_soft_cross_entropy_by_numpy(pair):
    q = scipy.special.softmax(np.float64(pair[1]), axis=-1)
    log_p = scipy.special.log_softmax(np.float64(pair[0]) / 2.0, axis=-1)
    value = losses.soft_cross_entropy(
        pair[0], jnp.asarray(q, jnp.float32), temperature=2.0
    )
    np.testing.assert_allclose(value, -(q * log_p).sum(-1), rtol=1e-5)


def test_a_class_of_probability_zero_may_be_masked():
    student = jnp.array([[0.0, 0.0, -jnp.inf]])
    q = jnp.array([[0.5, 0.5, 0.0]])
    value, gradient = jax.value_and_grad(
        lambda z: losses.soft_cross_entropy(z, q).sum()
    )(student)
    assert value == pytest.approx(math.log(2))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_means_over_teachers(pair):
    np.testing.assert_allclose(
        losses.mean_logits(pair), (pair[0] + pair[1]) / 2, rtol=1e-6
    )
    softmaxes = [scipy.special.softmax(np.float64(z), axis=-1) for z in pair]
    np.testing.assert_allclose(
        losses.mean_probabilities(pair), np.mean(softmaxes, axis=0), rtol=1e-5
    )


def test_no_gradient_passes_through_the_means(pair):
    for mean in (losses.mean_logits, losses.mean_probabilities):
        gradient = jax.grad(lambda z, mean=mean: mean([z, z])[0, 0])(pair[0])
        np.testing.assert_array_equal(gradient, 0)


def test_means_need_teachers_of_one_shape(pair):
    with pytest.raises(ValueError, match="at least one teacher"):
        losses.mean_logits([])
    with pytest.raises(ValueError, match=r"shapes \[\(4, 6\), \(2, 6\)\]"):
        losses.mean_probabilities([pair[0], pair[0][:2]])


def test_temperature_must_be_positive(pair):
    with pytest.raises(ValueError, match="temperature must be > 0"):
        losses.soft_cross_entropy(*pair, temperature=0.0)


def test_labels_of_another_shape_are_an_error(pair):
    with pytest.raises(ValueError, match="have 2 classes and student logits 6"):
        losses.soft_cross_entropy(pair[0], pair[1][:, :2])
