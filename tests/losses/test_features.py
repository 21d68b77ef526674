import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from jaxkd import losses
from jaxkd.losses.features import classify


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def test_hint_is_the_mean_over_all_but_the_batch():
    student, teacher = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)
    difference = np.float64(student) - np.float64(teacher)
    np.testing.assert_allclose(
        losses.hint(student, teacher), (difference**2).mean((1, 2, 3)), rtol=1e-6
    )


def test_reconstruction_is_the_sum_over_all_but_the_batch():
    student, teacher = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)
    np.testing.assert_allclose(
        losses.reconstruction(student, teacher),
        60 * losses.hint(student, teacher),
        rtol=1e-6,
    )


def test_reconstruction_counts_the_chosen_positions_only():
    student, teacher = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)
    positions = jnp.zeros((2, 3, 4, 1)).at[0, 1, 2].set(1.0)
    squares = (np.float64(student) - np.float64(teacher)) ** 2
    np.testing.assert_allclose(
        losses.reconstruction(student, teacher, positions=positions),
        [squares[0, 1, 2].sum(), 0.0],
        rtol=1e-6,
    )


def test_vid_is_the_likelihood_of_a_normal_distribution_without_its_constant():
    mean, teacher = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    log_scale = np.array([-1.0, 0.0, 2.0, 5.0])
    std = np.sqrt(np.log1p(np.exp(log_scale)) + 0.1)
    density = norm.logpdf(np.float64(teacher), np.float64(mean), std)
    np.testing.assert_allclose(
        losses.vid(mean, teacher, jnp.float32(log_scale), epsilon=0.1),
        (-density - 0.5 * np.log(2 * np.pi)).mean((1, 2)),
        rtol=1e-5,
    )


@pytest.mark.parametrize("scale", [-1e4, 1e4])
def test_vid_is_finite_for_extreme_variances(scale):
    def total(log_scale):
        return jnp.sum(losses.vid(normal(2, 3), normal(2, 3, seed=1), log_scale))

    value, gradient = jax.value_and_grad(total)(jnp.full(3, scale))
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(gradient))


def test_vid_teaches_the_variance_the_mean_squared_error():
    teacher = normal(64, 2)

    def total(variance):
        log_scale = jnp.log(jnp.expm1(variance - 1e-5))
        return jnp.mean(losses.vid(jnp.zeros_like(teacher), teacher, log_scale))

    best = jnp.mean(jnp.square(teacher), axis=0)
    np.testing.assert_allclose(jax.grad(total)(best), 0, atol=1e-5)


def test_softmax_regression_compares_logits_of_the_teachers_layer():
    feature, logits = normal(2, 3), normal(2, 4, seed=1)
    kernel, bias = normal(3, 4, seed=2), normal(4, seed=3)
    judged = np.float64(feature) @ np.float64(kernel) + np.float64(bias)
    difference = judged - np.float64(logits)
    np.testing.assert_allclose(
        losses.softmax_regression(feature, logits, kernel, bias),
        (difference**2).mean(1),
        rtol=1e-5,
    )


def test_softmax_regression_leaves_the_teachers_layer_alone():
    def total(kernel, bias):
        value = losses.softmax_regression(normal(2, 3), normal(2, 4), kernel, bias)
        return jnp.sum(value)

    gradients = jax.grad(total, (0, 1))(normal(3, 4, seed=2), normal(4, seed=3))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_classify_computes_in_float32():
    feature, kernel = normal(2, 300).astype(jnp.bfloat16), normal(300, 4, seed=2)
    logits = classify(feature, kernel, jnp.ones(4))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(
        logits, np.float64(feature) @ np.float64(kernel) + 1, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("loss", [losses.hint, losses.reconstruction])
def test_shapes_that_differ_ask_for_a_connector(loss):
    with pytest.raises(ValueError, match=r"\(2, 3\) and teacher features \(2, 4\)"):
        loss(normal(2, 3), normal(2, 4))
