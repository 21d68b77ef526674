"""Vector normalisation against numpy, and its behaviour at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.numerics import l2_normalize


@pytest.mark.parametrize("axis", [0, -1, (1, 2), (0, 1, 2)])
def test_unit_vectors_equal_numpy(axis):
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    norm = np.sqrt((x.astype(np.float64) ** 2).sum(axis, keepdims=True))
    np.testing.assert_allclose(l2_normalize(jnp.array(x), axis), x / norm, rtol=1e-6)


def test_zero_vectors_give_zeros_and_a_zero_gradient():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    gradient = jax.grad(lambda x: jnp.sum(l2_normalize(x) * jnp.array([[1.0, 2.0]])))(x)
    np.testing.assert_array_equal(l2_normalize(x)[0], [0, 0])
    np.testing.assert_array_equal(gradient[0], [0, 0])
    # d(x/|x|) . (1, 2) at (3, 4): ((1, 2) - (0.6, 0.8) * 2.2) / 5.
    np.testing.assert_allclose(gradient[1], [-0.064, 0.048], rtol=1e-5)


def test_norms_below_eps_divide_by_eps():
    x = jnp.array([3e-13, 4e-13])
    np.testing.assert_allclose(l2_normalize(x), [0.3, 0.4], rtol=1e-6)
    gradient = jax.grad(lambda x: l2_normalize(x, eps=1.0)[0])(jnp.array([0.1, 0.2]))
    np.testing.assert_array_equal(gradient, [1, 0])


@pytest.mark.parametrize("size", [1e-18, 1e18, 1e30])
def test_squares_that_leave_float32_do_not_matter(size):
    x = jnp.array([3.0, 4.0]) * size
    np.testing.assert_allclose(l2_normalize(x, eps=0.0), [0.6, 0.8], rtol=1e-5)
    gradient = jax.grad(lambda x: l2_normalize(x, eps=0.0)[0])(x)
    np.testing.assert_allclose(gradient * size, [0.128, -0.096], rtol=1e-4)


def test_the_gradient_is_orthogonal_to_the_vector():
    x = jax.random.normal(jax.random.key(0), (6, 7))
    g = jax.random.normal(jax.random.key(1), (6, 7))
    (gradient,) = jax.vjp(l2_normalize, x)[1](g)
    np.testing.assert_allclose(jnp.sum(gradient * x, -1), np.zeros(6), atol=1e-6)


def test_bfloat16_stays_bfloat16_and_is_computed_in_float32():
    x = jax.random.normal(jax.random.key(0), (2, 1000)).astype(jnp.bfloat16)
    out = l2_normalize(x)
    exact = l2_normalize(x.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def test_jit_equals_no_jit():
    x = jax.random.normal(jax.random.key(0), (3, 5))
    np.testing.assert_allclose(jax.jit(l2_normalize)(x), l2_normalize(x), rtol=1e-6)
