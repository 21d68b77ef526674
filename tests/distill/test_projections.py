import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.distill import projections

WIDTHS = {"d5": (100, 300), "d4": (4, 2)}


def test_draws_fill_the_range_of_the_reference_initialiser():
    drawn = projections.sample(jax.random.key(0), WIDTHS)
    assert drawn["d5"]["kernel"].shape == (100, 300)
    assert drawn["d5"]["bias"].shape == (300,)
    for x in drawn["d5"].values():
        assert x.dtype == jnp.float32
        assert 0.095 < jnp.max(jnp.abs(x)) <= 0.1
        np.testing.assert_allclose(jnp.std(x), 0.1 / np.sqrt(3), rtol=0.1)


def test_projections_are_drawn_independently():
    widths = {"a": (3, 2), "b": (3, 2)}
    drawn = projections.sample(jax.random.key(0), widths)
    assert jnp.all(drawn["a"]["kernel"] != drawn["b"]["kernel"])
    assert jnp.all(drawn["a"]["kernel"][0] != drawn["a"]["bias"])


@pytest.mark.parametrize("kind", ["resample", "fixed", "learned"])
def test_state_says_what_is_trained_and_what_is_remembered(kind):
    params, memory = projections.init(kind, jax.random.key(0), WIDTHS)
    assert set(params) == (set(WIDTHS) if kind == "learned" else set())
    assert set(memory) == (set(WIDTHS) if kind == "fixed" else set())


@pytest.mark.parametrize("kind", ["resample", "fixed", "learned"])
def test_only_resampled_projections_depend_on_the_step(kind):
    state = projections.init(kind, jax.random.key(0), WIDTHS)
    first, second = (
        projections.current(kind, *state, jax.random.key(step), WIDTHS)["d4"]["kernel"]
        for step in (1, 2)
    )
    assert bool(jnp.all(first == second)) == (kind != "resample")


def test_resampling_is_a_function_of_the_key():
    first, second = (
        projections.current("resample", {}, {}, jax.random.key(3), WIDTHS)
        for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)
