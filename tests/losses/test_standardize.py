import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses


@pytest.fixture
def logits():
    return jnp.asarray(np.random.default_rng(0).normal(2, 5, (6, 7)), jnp.float32)


def test_standardised_logits_have_mean_0_and_unbiased_deviation_1(logits):
    z = losses.standardize_logits(logits)
    np.testing.assert_allclose(np.mean(z, axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(np.std(z, axis=-1, ddof=1), 1, rtol=1e-5)


def test_eps_is_added_to_the_deviation(logits):
    centred = logits - np.mean(logits, axis=-1, keepdims=True)
    deviation = np.std(logits, axis=-1, ddof=1, keepdims=True)
    value = losses.standardize_logits(logits, eps=0.5)
    np.testing.assert_allclose(value, centred / (deviation + 0.5), rtol=1e-5)


def test_scale_and_shift_of_the_logits_do_not_matter(logits):
    value = losses.standardize_logits(3.0 * logits - 7.0)
    np.testing.assert_allclose(value, losses.standardize_logits(logits), atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 1), (3, 4)])
def test_equal_logits_and_a_single_class_give_zeros_without_gradient(shape):
    def total(z):
        scores = losses.standardize_logits(z)
        return jnp.sum(scores * jnp.arange(float(scores.size)).reshape(shape))

    value, gradient = jax.value_and_grad(total)(jnp.full(shape, 5.0))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_left_out_classes_are_as_if_not_there(logits):
    kept = np.array([0, 2, 5])
    where = jnp.zeros(logits.shape, bool).at[:, kept].set(True)
    expected = losses.standardize_logits(logits[:, kept])
    for value in (
        losses.standardize_logits(logits, where=where),
        losses.standardize_logits(jnp.where(where, logits, -jnp.inf)),
    ):
        np.testing.assert_allclose(value[:, kept], expected, rtol=1e-6)
        assert jnp.all(jnp.isneginf(jnp.delete(value, kept, axis=1)))


def test_kd_of_classes_masked_by_minus_infinity_has_finite_gradients(logits):
    masked = logits.at[:, 1].set(-jnp.inf)

    teacher = losses.standardize_logits(jnp.where(jnp.isinf(masked), masked, -masked))
    value, gradient = jax.value_and_grad(
        lambda s: losses.kd(losses.standardize_logits(s), teacher).sum()
    )(masked)
    assert 0 < value < 1e3
    assert jnp.all(jnp.isfinite(gradient))
    np.testing.assert_array_equal(gradient[:, 1], 0)


def test_impossible_arguments_are_one_line(logits):
    with pytest.raises(ValueError, match="eps must be > 0, got 0"):
        losses.standardize_logits(logits, eps=0)
    with pytest.raises(ValueError, match=r"where has shape \(6,\); classes of these"):
        losses.standardize_logits(logits, where=jnp.ones(6, bool))
