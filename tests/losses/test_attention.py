"""Attention and selectivity against slow NumPy versions of the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses


def maps(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def attention(x, exponent):
    """One example `[h, w, c]`, pixel by pixel."""
    energies = np.array(
        [np.mean(pixel**exponent) for row in x.astype(np.float64) for pixel in row]
    )
    return energies / np.linalg.norm(energies)


@pytest.mark.parametrize("exponent", [1, 2, 3, 4])
def test_attention_map_is_the_unit_vector_of_mean_powers(exponent):
    (x,) = maps(0, (2, 3, 2, 4))
    expected = [attention(example, exponent) for example in x]
    got = losses.attention_map(jnp.asarray(x), exponent=exponent)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_attention_map_of_zeros_is_zero():
    np.testing.assert_array_equal(losses.attention_map(jnp.zeros((1, 2, 2, 3))), 0)


def test_attention_transfer_averages_squares_over_pixels():
    s, t = maps(1, (2, 3, 2, 4), (2, 3, 2, 5))
    expected = [
        np.mean((attention(a, 2) - attention(b, 2)) ** 2)
        for a, b in zip(s, t, strict=True)
    ]
    got = losses.attention_transfer(jnp.asarray(s), jnp.asarray(t))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_attention_transfer_of_the_paper_is_a_norm():
    s, t = maps(2, (2, 3, 2, 4), (2, 3, 2, 5))
    expected = [
        np.linalg.norm(attention(a, 2) - attention(b, 2))
        for a, b in zip(s, t, strict=True)
    ]
    got = losses.attention_transfer(jnp.asarray(s), jnp.asarray(t), norm="paper")
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_the_larger_map_is_averaged_before_its_attention_is_taken(larger):
    small, large = map(jnp.asarray, maps(3, (2, 2, 3, 4), (2, 4, 6, 5)))
    pooled = large.reshape(2, 2, 2, 3, 2, 5).mean((2, 4))
    if larger == "student":
        got = losses.attention_transfer(large, small)
    else:
        got = losses.attention_transfer(small, large)
    expected = losses.attention_transfer(small, pooled)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_attention_does_not_change_with_the_scale_of_a_map():
    s, t = map(jnp.asarray, maps(4, (2, 3, 2, 4), (2, 3, 2, 5)))
    expected = losses.attention_transfer(s, t)
    got = losses.attention_transfer(100 * s, t / 100)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("norm", ["code", "paper"])
def test_equal_maps_have_no_distance_and_no_gradient(norm):
    (x,) = map(jnp.asarray, maps(5, (2, 3, 2, 4)))

    def total(s):
        return jnp.sum(losses.attention_transfer(s, x, norm=norm))

    value, gradient = jax.value_and_grad(total)(x)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_the_exponent_must_be_positive():
    x = jnp.ones((1, 2, 2, 1))
    with pytest.raises(ValueError, match="exponent must be an integer above 0, got 0"):
        losses.attention_transfer(x, x, exponent=0)


def selectivity(s, t):
    """One example: the three mean kernels, pair of channels by pair of channels."""

    def channels(x):
        flat = x.reshape(-1, x.shape[-1]).T.astype(np.float64)
        return [row / np.linalg.norm(row) for row in flat]

    def mean(first, second):
        return np.mean([[(a @ b) ** 2 for b in second] for a in first])

    s, t = channels(s), channels(t)
    return mean(t, t) + mean(s, s) - 2 * mean(s, t)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((4, 3, 5), (4, 3, 2)), ((2, 2, 5), (2, 2, 9)), ((1, 1, 3), (1, 1, 2))],
    ids=["few channels", "many channels", "one pixel"],
)
def test_selectivity_is_the_mean_discrepancy_of_channels(student, teacher):
    s, t = maps(6, (3, *student), (3, *teacher))
    expected = [selectivity(a, b) for a, b in zip(s, t, strict=True)]
    got = losses.neuron_selectivity_transfer(jnp.asarray(s), jnp.asarray(t))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_selectivity_does_not_see_the_order_scale_or_sign_of_channels():
    s, t = map(jnp.asarray, maps(7, (2, 4, 3, 5), (2, 4, 3, 6)))
    expected = losses.neuron_selectivity_transfer(s, t)
    changed = s[..., ::-1] * jnp.array([1.0, -2.0, 3.0, 0.5, -1.0]).reshape(1, 1, 1, 5)
    got = losses.neuron_selectivity_transfer(changed, t)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_selectivity_averages_the_larger_map():
    s, t = map(jnp.asarray, maps(8, (2, 4, 4, 3), (2, 2, 2, 5)))
    pooled = s.reshape(2, 2, 2, 2, 2, 3).mean((2, 4))
    expected = losses.neuron_selectivity_transfer(pooled, t)
    got = losses.neuron_selectivity_transfer(s, t)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_equal_sets_of_channels_have_no_discrepancy():
    (x,) = map(jnp.asarray, maps(9, (2, 4, 3, 5)))

    def total(s):
        return jnp.sum(losses.neuron_selectivity_transfer(s, x[..., ::-1]))

    value, gradient = jax.value_and_grad(total)(x)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_maps_of_other_batches_are_refused():
    with pytest.raises(ValueError, match="selectivity maps have batch sizes"):
        losses.neuron_selectivity_transfer(
            jnp.ones((2, 2, 2, 1)), jnp.ones((3, 2, 2, 1))
        )
