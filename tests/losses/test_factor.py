import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses


def factors(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def attention(x, power):
    mean = np.mean(np.float64(x) ** power, axis=-1).reshape(len(x), -1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


@pytest.mark.parametrize(("p1", "p2"), [(2, 1), (2, 2), (4, 1), (1, 3)])
def test_default_compares_attention_maps_of_factors(p1, p2):
    s, t = factors(0, (2, 3, 2, 4), (2, 3, 2, 5))
    difference = attention(s, p1) - attention(t, p1)
    expected = np.mean(np.abs(difference) ** p2, axis=1)
    np.testing.assert_allclose(losses.ft(s, t, p1=p1, p2=p2), expected, rtol=1e-5)


@pytest.mark.parametrize("p2", [1, 2])
def test_paper_compares_unit_factors(p2):
    s, t = factors(1, (2, 3, 2, 4), (2, 3, 2, 4))
    flat = [np.float64(x).reshape(2, -1) for x in (s, t)]
    s_unit, t_unit = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in flat)
    expected = np.mean(np.abs(s_unit - t_unit) ** p2, axis=1)
    got = losses.ft(s, t, p2=p2, variant="paper")
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_larger_factor_is_averaged():
    s, t = factors(2, (2, 4, 4, 3), (2, 2, 2, 3))
    pooled = s.reshape(2, 2, 2, 2, 2, 3).mean((2, 4))
    for variant in ("repdistiller", "paper"):
        np.testing.assert_allclose(
            losses.ft(s, t, variant=variant),
            losses.ft(pooled, t, variant=variant),
            rtol=1e-5,
        )


@pytest.mark.parametrize("variant", ["repdistiller", "paper"])
def test_equal_factors_have_no_distance_and_no_gradient(variant):
    (x,) = factors(3, (2, 3, 2, 4))
    value, gradient = jax.value_and_grad(
        lambda s: jnp.sum(losses.ft(s, x, variant=variant))
    )(x)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_only_the_default_compares_factors_of_other_widths():
    s, t = factors(4, (2, 3, 2, 4), (2, 3, 2, 5))
    assert losses.ft(s, t).shape == (2,)
    with pytest.raises(ValueError, match="has 4 channels and the teacher's 5"):
        losses.ft(s, t, variant="paper")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p1": 0}, "exponent must be an integer above 0"),
        ({"p2": 0}, "p2 must be an integer above 0, got 0"),
    ],
)
def test_impossible_options_are_named(options, message):
    x = jnp.ones((1, 2, 2, 1))
    with pytest.raises(ValueError, match=message):
        losses.ft(x, x, **options)
