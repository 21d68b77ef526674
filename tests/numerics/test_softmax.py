import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxkd.numerics import log_normalizer, pick, softmax


def array(*shape, scale=3.0):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32) * scale


def close(a, b, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(a, b, rtol, atol)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_the_parts_of_the_normaliser_add_up(offset):
    x = array(4, 7) + np.float32(offset)
    maximum, log_sum = log_normalizer(jnp.asarray(x))
    exact = scipy.special.log_softmax(x.astype(np.float64), axis=-1)
    close((x - maximum[:, None]) - log_sum[:, None], exact)


def test_derivatives_of_the_normaliser_are_those_of_logsumexp():
    x, direction = jnp.asarray(array(5)), jnp.asarray(array(5, scale=1.0))

    def ours(x):
        maximum, log_sum = log_normalizer(x)
        return jnp.sin(maximum + log_sum)

    # The maximum is held constant: its share is in the derivative of `log_sum`.
    def exact(x):
        return jnp.sin(jax.nn.logsumexp(x))

    close(jax.grad(ours)(x), jax.grad(exact)(x))
    close(*(jax.jvp(f, (x,), (direction,))[1] for f in (ours, exact)))
    for outer in (jax.jacfwd, jax.jacrev):
        close(outer(jax.grad(ours))(x), jax.hessian(exact)(x))


def test_an_impossible_class_has_no_share_and_no_gradient():
    x = jnp.array([0.0, -jnp.inf, 1.0])
    gradient = jax.grad(lambda x: log_normalizer(x)[1])(x)
    close(gradient, scipy.special.softmax([0.0, -np.inf, 1.0]))


def test_a_pick_takes_one_entry_of_every_row_and_gives_it_the_gradient():
    x, index = jnp.asarray(array(3, 4)), jnp.array([2, 0, 3])
    close(pick(x, index), np.asarray(x)[np.arange(3), index])
    gradient = jax.grad(lambda x: jnp.sum(pick(x, index)))(x)
    np.testing.assert_array_equal(gradient, np.eye(4)[np.asarray(index)])


@pytest.mark.parametrize("index", [-1, 4])
def test_what_is_no_entry_is_nan_and_gets_no_gradient(index):
    x = jnp.asarray(array(1, 4))
    assert jnp.isnan(pick(x, jnp.array([index])))[0]
    gradient = jax.grad(lambda x: jnp.sum(pick(x, jnp.array([index]))))(x)
    np.testing.assert_array_equal(gradient, 0)


def test_a_pick_leaves_infinities_of_other_entries_alone():
    x = jnp.array([[1.0, -jnp.inf, jnp.inf]])
    assert pick(x, jnp.array([0])).tolist() == [1.0]


def test_softmax_and_its_derivatives_are_exact_in_float32():
    x, direction = jnp.asarray(array(2, 5)), jnp.asarray(array(2, 5, scale=1.0))
    close(softmax(x), scipy.special.softmax(x, axis=-1))

    def total(f):
        return lambda x: jnp.sum(jnp.cos(f(x)) * direction)

    close(jax.grad(total(softmax))(x), jax.grad(total(jax.nn.softmax))(x))
    close(*(jax.jvp(f, (x,), (direction,))[1] for f in (softmax, jax.nn.softmax)))
    close(jax.hessian(total(softmax))(x), jax.hessian(total(jax.nn.softmax))(x))


def test_softmax_of_narrow_scores_is_computed_in_float32_and_kept_narrow():
    x = jnp.asarray(array(4, 64), jnp.bfloat16)
    result = softmax(x, jnp.bfloat16)
    assert result.dtype == jnp.bfloat16
    exact = scipy.special.softmax(np.asarray(x, np.float64), axis=-1)
    close(result.astype(jnp.float32), exact, rtol=2**-8)
    jaxpr = jax.make_jaxpr(lambda x: jax.vjp(lambda x: softmax(x, x.dtype), x)[1])(x)
    # The pullback carries the result alone.
    kept = [v.aval for v in jaxpr.jaxpr.outvars]
    assert [(a.shape, a.dtype) for a in kept] == [((4, 64), jnp.bfloat16)]
