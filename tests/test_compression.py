"""Compressions as values: masks, chains, names."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import compression
from jaxkd.compression import After, Compression, apply_masks, chain, masked


def after(params, **changes):
    values = dict(
        params=params,
        gradients=params,
        key=jax.random.key(0),
        step=jnp.int32(3),
        steps_per_epoch=2,
        total_steps=10,
    )
    return After(**{**values, **changes})


def halving(factor=0.5, *, path="a/kernel"):
    """Masks the first number of an array, scales it, and counts its updates."""

    def init(key, params):
        mask = jnp.ones(params[path].shape, bool).at[0].set(False)
        return {"gain": jnp.float32(factor)}, {"mask": mask, "updates": jnp.int32(0)}

    def effective(learned, state, params):
        kernel = masked(params[path], state["mask"]) * learned["gain"]
        return {**params, path: kernel}

    def update(learned, state, told):
        params = {**told.params, path: told.params[path] + 1}
        return params, {**state, "updates": state["updates"] + 1}

    return Compression(
        init=init,
        effective=effective,
        masks=lambda state: {path: state["mask"]},
        update=update,
        terms=lambda learned, state, params: {"gain": learned["gain"]},
        weights={"gain": 2.0},
        facts=lambda learned, state, params: {"density": jnp.mean(state["mask"])},
    )


PARAMS = {"a/kernel": jnp.arange(1.0, 4.0), "b/kernel": jnp.ones(2)}


def test_masked_passes_the_whole_gradient():
    mask = jnp.array([True, False, True])
    value, gradient = jax.value_and_grad(
        lambda x: jnp.sum(masked(x, mask) * jnp.array([1.0, 2.0, 3.0]))
    )(jnp.ones(3))
    assert value == 4
    np.testing.assert_array_equal(gradient, [1, 2, 3])


def test_masks_stop_what_is_not_finite():
    broken = {"x": jnp.array([jnp.nan, 1.0]), "y": jnp.ones(1)}
    result = apply_masks(broken, {"x": jnp.array([False, True])})
    np.testing.assert_array_equal(result["x"], [0, 1])
    np.testing.assert_array_equal(result["y"], [1])


def test_trees_become_paths_and_back():
    tree = {"block": {"conv": {"kernel": jnp.ones(2)}}, "head": {"bias": jnp.zeros(1)}}
    flat = compression.flatten(tree)
    assert list(flat) == ["block/conv/kernel", "head/bias"]
    back = compression.unflatten(flat, tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    np.testing.assert_array_equal(back["block"]["conv"]["kernel"], [1, 1])


def test_a_chain_does_what_its_parts_do_in_their_order():
    parts = {"first": halving(0.5), "second": halving(4.0)}
    both = chain(parts)
    learned, state = both.init(jax.random.key(0), PARAMS)
    assert set(learned) == {"first/gain", "second/gain"}
    params = both.effective(learned, state, PARAMS)
    np.testing.assert_array_equal(params["a/kernel"], [0, 4, 6])
    np.testing.assert_array_equal(params["b/kernel"], [1, 1])
    new, state = both.update(learned, state, after(PARAMS))
    np.testing.assert_array_equal(new["a/kernel"], [3, 4, 5])
    assert state["first"]["updates"] == state["second"]["updates"] == 1
    assert both.terms(learned, state, PARAMS) == {"first/gain": 0.5, "second/gain": 4.0}
    assert both.weights == {"first/gain": 2.0, "second/gain": 2.0}
    assert set(both.facts(learned, state, PARAMS)) == {
        "first/density",
        "second/density",
    }
    assert both.layers is None


def test_a_number_takes_part_where_all_masks_let_it():
    def fixed(mask):
        return Compression(
            init=lambda key, params: ({}, {"mask": jnp.array(mask)}),
            masks=lambda state: {"a/kernel": state["mask"]},
        )

    both = chain({"x": fixed([True, True, False]), "y": fixed([False, True, True])})
    learned, state = both.init(jax.random.key(0), PARAMS)
    assert learned == {}
    masks = both.masks(state)
    np.testing.assert_array_equal(masks["a/kernel"], [False, True, False])
    # The defaults leave everything as it is.
    assert both.effective(learned, state, PARAMS)["a/kernel"] is PARAMS["a/kernel"]
    assert both.update(learned, state, after(PARAMS))[0] is PARAMS


def test_parts_get_keys_of_their_own():
    def drawing():
        return Compression(
            init=lambda key, params: ({"x": jax.random.normal(key)}, {}),
            update=lambda learned, state, told: (
                {"a/kernel": told.params["a/kernel"] + jax.random.normal(told.key)},
                state,
            ),
        )

    both = chain({"x": drawing(), "y": drawing()})
    learned, state = both.init(jax.random.key(0), PARAMS)
    assert learned["x/x"] != learned["y/x"]
    told = after({"a/kernel": jnp.zeros(())})
    sum_of_two, _ = both.update(learned, state, told)
    one, _ = chain({"x": drawing()}).update(learned, state, told)
    assert sum_of_two["a/kernel"] != 2 * one["a/kernel"]


def test_contexts_of_layers_are_entered_together():
    entered = []

    def part(name):
        @contextlib.contextmanager
        def layers(train):
            entered.append((name, train))
            yield
            entered.append((name, "left"))

        return Compression(init=lambda key, params: ({}, {}), layers=layers)

    both = chain({"x": part("x"), "plain": halving(), "y": part("y")})
    with both.layers(True):
        assert entered == [("x", True), ("y", True)]
    assert entered[2:] == [("y", "left"), ("x", "left")]


def test_names():
    assert compression.names() == sorted(compression.names())
    with pytest.raises(KeyError, match="no compression 'rigel'"):
        compression.create("rigel")
    with pytest.raises(TypeError, match="must return a jaxkd.compression.Compression"):
        compression.create("fractions:Fraction")
