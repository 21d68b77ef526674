"""Pruning by magnitude: counts along ramps, thresholds, regrowth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import compression
from jaxkd.compression import After, apply_masks
from jaxkd.sparsity import magnitude as magnitude_lib

SHAPES = {"stem/kernel": (3, 3, 3, 8), "a/kernel": (3, 3, 8, 8), "b/kernel": (8, 40)}
SIZES = {"a/kernel": 576, "b/kernel": 320}


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    scales = {"stem/kernel": 1.0, "a/kernel": 1.0, "b/kernel": 3.0}
    return {
        p: jnp.asarray(scales[p] * rng.normal(size=s), jnp.float32)
        for p, s in SHAPES.items()
    }


def after(params, gradients, *, step, total=40):
    return After(
        params=params,
        gradients=gradients,
        key=jax.random.key(0),
        step=jnp.int32(step),
        steps_per_epoch=4,
        total_steps=total,
    )


def ramp(t, initial, final, end=30):
    return final + (initial - final) * (1 - min(t / end, 1.0)) ** 3


def kept(size, sparsity):
    return size - int(sparsity * size)


def test_magnitude_keeps_the_largest_weights_of_every_layer():
    made = compression.create("magnitude", sparsity=0.8)
    params = random_params()
    _, state = made.init(jax.random.key(0), params)
    for path, mask in state["masks"].items():
        absolute = np.abs(np.asarray(params[path]))
        assert mask.sum() == kept(SIZES[path], 0.8)
        assert absolute[np.asarray(mask)].min() > absolute[~np.asarray(mask)].max()
    told = after(params, params, step=9)
    assert made.update({}, state, told) == (params, state)


def test_global_magnitude_compares_layers_with_each_other():
    made = compression.create("magnitude", sparsity=0.8, distribution="global")
    params = random_params()
    _, state = made.init(jax.random.key(0), params)
    every = np.sort(
        np.concatenate([np.abs(np.asarray(params[p])).reshape(-1) for p in SIZES])
    )
    count = kept(896, 0.8)
    for path, mask in state["masks"].items():
        wanted = np.abs(np.asarray(params[path])) >= every[-count]
        np.testing.assert_array_equal(mask, wanted)
    share = {p: float(m.mean()) for p, m in state["masks"].items()}
    assert share["b/kernel"] > 2 * share["a/kernel"]  # its weights are larger
    assert made.facts({}, state, params)["target_density"] == pytest.approx(0.2)


@pytest.mark.parametrize("initial", [0.0, 0.3])
@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_gmp_follows_the_cubic_ramp(initial, distribution):
    made = compression.create(
        "gmp", sparsity=0.9, initial_sparsity=initial, frequency=7,
        distribution=distribution,
    )  # fmt: skip
    params = random_params()
    _, state = made.init(jax.random.key(0), params)
    update = jax.jit(made.update)
    before = {p: np.asarray(m) for p, m in state["masks"].items()}
    assert sum(m.sum() for m in before.values()) == (
        kept(896, initial)
        if distribution == "global"
        else sum(kept(n, initial) for n in SIZES.values())
    )
    for t in range(1, 41):
        params = apply_masks(params, made.masks(state))
        params, state = update({}, state, after(params, params, step=t - 1))
        masks = {p: np.asarray(m) for p, m in state["masks"].items()}
        if t in (7, 14, 21, 28, 30):
            s = ramp(t, initial, 0.9)
            if distribution == "global":
                assert sum(m.sum() for m in masks.values()) == kept(896, s)
            else:
                for path, mask in masks.items():
                    assert mask.sum() == kept(SIZES[path], s)
        else:
            assert all((masks[p] == before[p]).all() for p in masks)
        for path, mask in masks.items():
            assert not (mask & ~before[path]).any()  # nothing comes back
            absolute = np.abs(np.asarray(params[path]))
            gone = before[path] & ~mask
            if gone.any():
                assert absolute[mask].min() >= absolute[gone].max()
        before = masks


def test_gmp_gives_every_layer_its_own_ramp():
    made = compression.create(
        "gmp", sparsity=0.9, initial_sparsity=0.5, frequency=15, distribution="erk"
    )
    params = random_params()
    _, state = made.init(jax.random.key(0), params)
    first = {p: float(m.mean()) for p, m in state["masks"].items()}
    _, half = made.update({}, state, after(params, params, step=14))
    _, last = made.update({}, half, after(params, params, step=29))
    for path, size in SIZES.items():
        end = float(last["masks"][path].mean())
        wanted = end + (first[path] - end) * 0.125
        assert float(half["masks"][path].mean()) == pytest.approx(wanted, abs=3 / size)
    total = sum(int(m.sum()) for m in last["masks"].values())
    assert abs(total - 0.1 * 896) <= 2
    facts = made.facts({}, last, params)
    assert facts["target_density"] == pytest.approx(0.1)
    assert facts["density"] == pytest.approx(total / 896)


def numpy_granet(mask, weights, gradient, count, fraction):
    """Pruned to the count, then exchanged, with indices."""
    mask, weights, gradient = (
        np.asarray(x).reshape(-1) for x in (mask, weights, gradient)
    )
    active = np.flatnonzero(mask)
    order = active[np.argsort(-np.abs(weights[active]), kind="stable")]
    left = min(count, len(active))
    stay = order[: left - int(fraction * left)]
    new = np.zeros(mask.size, bool)
    new[stay] = True
    others = np.flatnonzero(~new)
    grown = others[np.argsort(-np.abs(gradient[others]), kind="stable")]
    new[grown[: count - len(stay)]] = True
    return new


@pytest.mark.parametrize("t", [10, 30])
def test_granet_prunes_to_the_ramp_and_exchanges(t):
    made = compression.create("granet", sparsity=0.9, frequency=10)
    params, gradients = random_params(), random_params(5)
    _, state = made.init(jax.random.key(1), params)
    assert 0.4 < float(state["masks"]["a/kernel"].mean()) < 0.6  # half, at random
    params = apply_masks(params, state["masks"])
    new_params, new = made.update({}, state, after(params, gradients, step=t - 1))
    fraction = 0.3 * (0.5 * np.cos(np.pi * t / 30) + 0.5)
    for path, mask in state["masks"].items():
        count = kept(SIZES[path], ramp(t, 0.5, 0.9))
        wanted = numpy_granet(mask, params[path], gradients[path], count, fraction)
        found = np.asarray(new["masks"][path])
        np.testing.assert_array_equal(found.reshape(-1), wanted)
        assert found.sum() == count
        grown = found & ~np.asarray(mask)
        assert grown.any() == (t < 30)
        assert (np.asarray(new_params[path])[grown] == 0).all()


def test_granet_may_begin_dense():
    made = compression.create("granet", initial_sparsity=0.0, frequency=10)
    _, state = made.init(jax.random.key(1), random_params())
    assert all(mask.all() for mask in state["masks"].values())


def test_pruning_leaves_fewer_if_there_are_fewer():
    mask = jnp.array([True, False, True, False])
    weights = jnp.array([1.0, 9.0, 2.0, 9.0])
    np.testing.assert_array_equal(magnitude_lib.prune(mask, weights, 3), mask)
    np.testing.assert_array_equal(
        magnitude_lib.prune(mask, weights, 1), [False, False, True, False]
    )
    together = magnitude_lib.prune_together({"x": mask}, {"x": weights}, 4)
    np.testing.assert_array_equal(together["x"], mask)


@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_outputs_can_keep_their_largest_weight(distribution):
    params = random_params()
    params["a/kernel"] = params["a/kernel"].at[..., 2].multiply(1e-3)
    for outputs, whole in (("any", False), ("one", True)):
        made = compression.create(
            "magnitude", sparsity=0.9, distribution=distribution,
            scope=dict(outputs=outputs),
        )  # fmt: skip
        _, state = made.init(jax.random.key(0), params)
        mask = state["masks"]["a/kernel"]
        assert bool(mask.any(axis=(0, 1, 2)).all()) == whole


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gmp", dict(initial_sparsity=0.95), "at most sparsity, got 0.95 and 0.9"),
        ("granet", dict(sparsity=0.4), "at most sparsity, got 0.5 and 0.4"),
        ("granet", dict(initial_sparsity=-0.1), r"initial_sparsity must be in \[0, 1"),
        ("granet", dict(drop_fraction=1.0), "drop_fraction must be in"),
        ("gmp", dict(end=1.5), "0 <= begin < end <= 1"),
        ("magnitude", dict(sparsity=1.0), "sparsity must be in"),
    ],
)
def test_impossible_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        compression.create(name, **options)


def test_granet_does_not_prune_together():
    with pytest.raises(TypeError, match="'distribution' must be one of 'uniform'"):
        compression.create("granet", distribution="global")


@pytest.mark.parametrize("name", ["gmp", "granet", "magnitude"])
def test_training_ends_at_the_target(start, name):
    options = {} if name == "magnitude" else dict(frequency=2)
    run = start(compression.create(name, sparsity=0.75, **options), epochs=2)
    structure = jax.tree.structure(run.state)
    first = run.density()
    run.run(7)  # the ramp ends at int(0.75 * 8) = 6
    assert jax.tree.structure(run.state) == structure
    assert run.density() == 0.25 and first >= run.density()
    for path, mask in run.memory["masks"].items():
        assert (run.params[path][~mask] == 0).all()
        assert (run.moments[f"network/{path}"][~mask] == 0).all()
    assert run.metrics["facts"]["density"] == 0.25


def test_start_from_prunes_the_weights_that_were_taken(start):
    run = start(compression.create("magnitude", sparsity=0.75))
    variables = run.student.init(jax.random.key(0))
    trained = jax.tree.map(jnp.copy, variables["params"])
    trained["body"]["kernel"] = random_params(3)["a/kernel"][:, :, :4]
    new = run.student.upkeep.restart(
        jax.random.key(1), {**variables, "params": trained}
    )
    absolute = np.abs(np.asarray(trained["body"]["kernel"]))
    mask = np.asarray(new["params"]["body"]["kernel"]) != 0
    assert mask.sum() == 72 and absolute[mask].min() > absolute[~mask].max()
