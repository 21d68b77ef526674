"""Static masks, SET and RigL: alone against NumPy, and in the real step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxkd import compression
from jaxkd.compression import After
from jaxkd.sparsity import dynamic, masks

SPARSE = ("body/kernel", "hidden/kernel")
SHAPES = {"stem/kernel": (3, 3, 3, 8), "a/kernel": (3, 3, 8, 8), "b/kernel": (8, 40)}


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    return {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in SHAPES.items()}


def after(params, gradients, *, step, total=40, seed=0):
    return After(
        params=params,
        gradients=gradients,
        key=jax.random.key(seed),
        step=jnp.int32(step),
        steps_per_epoch=4,
        total_steps=total,
    )


def begin(name, seed=0, **options):
    """A compression, its state, and parameters that obey the first masks."""
    made = compression.create(name, **options)
    params = random_params(seed)
    learned, state = made.init(jax.random.key(1), params)
    assert learned == {}
    return made, state, compression.apply_masks(params, made.masks(state))


def cosine(t, end, initial=0.3):
    return initial * (0.5 * math.cos(math.pi * t / end) + 0.5)


# The first masks.


@pytest.mark.parametrize("name", ["static", "set", "rigl"])
@pytest.mark.parametrize(
    ("init", "counts"),
    [("random", (576 - int(0.7 * 576), 320 - 224)), ("magnitude", (173, 96))],
)
def test_first_masks_have_exact_counts(name, init, counts):
    made, state, params = begin(name, sparsity=0.7, init=init)
    found = made.masks(state)
    assert tuple(int(found[p].sum()) for p in ("a/kernel", "b/kernel")) == counts
    assert set(found) == {"a/kernel", "b/kernel"}
    if init == "magnitude":
        dense = random_params()
        for path, mask in found.items():
            np.testing.assert_array_equal(mask, masks.magnitude_mask(dense[path], 0.7))


def test_bernoulli_masks_are_random_in_number_and_layers_differ():
    counts = {int(begin("rigl", seed=s)[1]["masks"]["a/kernel"].sum()) for s in (0, 0)}
    assert len(counts) == 1  # equal keys, equal masks
    made = compression.create("rigl", sparsity=0.5)
    found = [
        made.init(jax.random.key(s), random_params())[1]["masks"]["a/kernel"]
        for s in range(6)
    ]
    assert len({int(mask.sum()) for mask in found}) > 1
    assert abs(np.mean([mask.mean() for mask in found]) - 0.5) < 0.05


def test_distributions_reach_the_masks():
    _, state, _ = begin("static", sparsity=0.8, distribution="erk", init="random")
    share = {p: float(m.mean()) for p, m in state["masks"].items()}
    assert share["b/kernel"] > share["a/kernel"]
    size = 576 + 320
    kept = sum(int(m.sum()) for m in state["masks"].values())
    assert abs(kept - 0.2 * size) <= 2


def test_facts_tell_the_density_of_the_sparse_kernels():
    made, state, params = begin("static", sparsity=0.75, init="random")
    facts = made.facts({}, state, params)
    assert facts["density"] == facts["target_density"] == 0.25


# Exchanges.


def numpy_exchange(mask, weights, growth, fraction, target):
    mask, weights, growth = (np.asarray(x).reshape(-1) for x in (mask, weights, growth))
    active = np.flatnonzero(mask)
    kept = len(active) - int(fraction * len(active))
    order = active[np.argsort(-np.abs(weights[active]), kind="stable")]
    new = np.zeros(mask.size, bool)
    new[order[:kept]] = True
    others = np.flatnonzero(~new)
    grown = others[np.argsort(-growth[others], kind="stable")]
    new[grown[: max(target - kept, 0)]] = True
    return new


@pytest.mark.parametrize("init", ["bernoulli", "random"])
@pytest.mark.parametrize("t", [5, 15])
def test_rigl_drops_small_weights_and_grows_large_gradients(init, t):
    made, state, params = begin("rigl", sparsity=0.9, frequency=5, init=init)
    gradients = random_params(seed=9)
    new_params, new = made.update({}, state, after(params, gradients, step=t - 1))
    for path, mask in state["masks"].items():
        target = int(np.float32((1 - 0.9) * mask.size))
        wanted = numpy_exchange(
            mask, params[path], np.abs(gradients[path]), cosine(t, 30), target
        ).reshape(mask.shape)
        np.testing.assert_array_equal(new["masks"][path], wanted)
        assert new["masks"][path].sum() == max(
            target, mask.sum() - int(cosine(t, 30) * mask.sum())
        )
        # Dropped and grown at once: the value stays. Grown: 0.
        both = np.asarray(mask & new["masks"][path])
        np.testing.assert_array_equal(new_params[path][both], params[path][both])
        grown = np.asarray(new["masks"][path] & ~mask)
        assert grown.any() or init == "bernoulli"  # which may have too many
        assert (np.asarray(new_params[path])[grown] == 0).all()
    np.testing.assert_array_equal(new_params["stem/kernel"], params["stem/kernel"])


def test_a_weight_that_is_dropped_and_regrown_keeps_its_value():
    made, state, params = begin("rigl", sparsity=0.5, frequency=5, init="random")
    # The gradient is largest where weights are active, so all that drop come back.
    gradients = {p: jnp.zeros(s) for p, s in SHAPES.items()}
    gradients |= {p: m.astype(jnp.float32) for p, m in state["masks"].items()}
    new_params, new = made.update({}, state, after(params, gradients, step=4))
    for path, mask in state["masks"].items():
        np.testing.assert_array_equal(new["masks"][path], mask)
        np.testing.assert_array_equal(new_params[path], params[path])


@pytest.mark.parametrize("step", [0, 3, 5, 29, 34])
def test_masks_stay_between_exchanges_and_outside_the_window(step):
    # Step t = step + 1 is no multiple of 5, or not before 0.75 * 40 = 30.
    made, state, params = begin("rigl", frequency=5)
    new_params, new = made.update({}, state, after(params, params, step=step))
    for path, mask in state["masks"].items():
        np.testing.assert_array_equal(new["masks"][path], mask)
        np.testing.assert_array_equal(new_params[path], params[path])


def test_no_exchange_fits_into_a_short_stage():
    made, state, params = begin("rigl", frequency=100)
    _, new = made.update({}, state, after(params, params, step=99, total=100))
    for path, mask in state["masks"].items():
        np.testing.assert_array_equal(new["masks"][path], mask)


def test_set_grows_at_random_by_the_key():
    made, state, params = begin("set", sparsity=0.8, frequency=5, init="random")
    zero = {p: jnp.zeros(s) for p, s in SHAPES.items()}
    new = {
        seed: made.update({}, state, after(params, zero, step=4, seed=seed))[1]["masks"]
        for seed in (0, 1, 2)
    }
    for path, mask in state["masks"].items():
        count = int(mask.sum())
        kept = count - int(cosine(5, 30) * count)
        weights = np.abs(np.asarray(params[path])).reshape(-1)
        largest = np.argsort(-weights, kind="stable")[:kept]
        for found in new.values():
            assert found[path].sum() == int(np.float32((1 - 0.8) * mask.size))
            assert np.asarray(found[path]).reshape(-1)[largest].all()
        assert (new[0][path] != new[1][path]).any()
        # What grows is spread over the layer, not taken in order.
        grown = np.flatnonzero(np.asarray(new[2][path] & ~mask))
        assert grown.max() > 0.5 * mask.size


def test_googles_variant_starts_at_once_and_grows_what_it_dropped():
    options = dict(sparsity=0.9, frequency=5, init="bernoulli")
    made, state, params = begin("rigl", variant="google", **options)
    gradients = random_params(seed=9)
    # Counted from 0; 0.75 * 40 = 30 is part of the window.
    for step, changes in [(0, True), (4, False), (5, True), (30, True), (35, False)]:
        _, new = made.update({}, state, after(params, gradients, step=step))
        for path, mask in state["masks"].items():
            assert new["masks"][path].sum() == mask.sum()
            moved = bool((new["masks"][path] != mask).any())
            assert moved == (changes and int(cosine(step, 30) * mask.sum()) > 0)


def test_googles_noise_decides_between_equal_weights():
    made, state, params = begin("rigl", variant="google", sparsity=0.5, frequency=5)
    equal = {p: jnp.where(m, 1.0, 0.0) for p, m in state["masks"].items()}
    equal["stem/kernel"] = params["stem/kernel"]
    zero = {p: jnp.zeros(s) for p, s in SHAPES.items()}
    kept = []
    for seed in range(2):
        _, new = made.update({}, state, after(equal, zero, step=0, seed=seed))
        kept.append(np.asarray(new["masks"]["a/kernel"]))
    assert (kept[0] != kept[1]).any()


def test_every_output_keeps_a_weight_if_asked():
    made, state, params = begin(
        "rigl", sparsity=0.97, frequency=5, drop_fraction=0.9, init="random",
        scope={"outputs": "one"},
    )  # fmt: skip
    assert state["masks"]["a/kernel"].any(axis=(0, 1, 2)).all()
    gradients = {p: jnp.zeros(s).at[..., 0].set(1.0) for p, s in SHAPES.items()}
    _, new = made.update({}, state, after(params, gradients, step=4))
    assert new["masks"]["a/kernel"].any(axis=(0, 1, 2)).all()
    assert new["masks"]["a/kernel"].sum() == int(np.float32((1 - 0.97) * 576))


# Options.


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("static", dict(sparsity=1.0), r"sparsity must be in \[0, 1\), got 1.0"),
        ("rigl", dict(sparsity=-0.5), r"sparsity must be in \[0, 1\)"),
        ("rigl", dict(drop_fraction=1.0), r"drop_fraction must be in \[0, 1\)"),
        ("set", dict(frequency=0), "frequency must be at least 1 step"),
        ("set", dict(begin=0.8), "0 <= begin < end <= 1, got 0.8 and 0.75"),
        ("rigl", dict(scope=dict(rule="released")), "needs num_classes"),
    ],
)
def test_impossible_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        compression.create(name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sparsty=0.5), "did you mean 'sparsity'"),
        (dict(scope=dict(dens=("x",))), "scope has no option 'dens'; did you mean"),
        (dict(scope=dict(outputs="two")), "must be one of 'any', 'one'"),
        (dict(variant="mine"), "must be one of 'sparse_ift', 'google'"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(TypeError, match=message):
        compression.create("rigl", **options)


# In the real step.


@pytest.mark.parametrize("name", ["static", "set", "rigl"])
def test_training_keeps_counts_zeros_and_structure(start, name):
    options = {} if name == "static" else dict(frequency=2)
    run = start(compression.create(name, sparsity=0.75, init="random", **options))
    before = run.memory["masks"]
    structure = jax.tree.structure(run.state)
    assert set(before) == set(SPARSE)
    run.run(5)
    assert jax.tree.structure(run.state) == structure
    moved = False
    for path, mask in run.memory["masks"].items():
        assert mask.dtype == bool and mask.sum() == before[path].sum()
        assert (run.params[path][~mask] == 0).all()
        assert (run.params[path][mask] != 0).any()
        assert (run.moments[f"network/{path}"][~mask] == 0).all()
        moved |= bool((mask != before[path]).any())
    assert moved == (name != "static")
    assert run.metrics["facts"]["density"] == 0.25


def test_grown_weights_are_trained_from_zero(start):
    run = start(dynamic.rigl(sparsity=0.75, frequency=2, drop_fraction=0.5))
    run.run(1)
    before = run.memory["masks"]
    run.run(1)
    new = {p: m & ~before[p] for p, m in run.memory["masks"].items()}
    assert any(mask.any() for mask in new.values())
    for path, grown in new.items():
        assert (run.params[path][grown] == 0).all()
        assert (run.moments[f"network/{path}"][grown] == 0).all()
    run.run(1)
    moved = np.concatenate([run.params[p][grown] for p, grown in new.items()])
    assert (moved != 0).any()


def test_eight_devices_have_the_masks_of_one(start):
    make = [
        lambda: dynamic.rigl(sparsity=0.75, frequency=2),
        lambda: dynamic.sparse_evolutionary(sparsity=0.75, frequency=2),
    ]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    for compression_of in make:
        one, many = start(compression_of()), start(compression_of())
        many.state = jax.device_put(many.state, everywhere)
        many.batch = jax.device_put(
            many.batch, NamedSharding(mesh, PartitionSpec("data"))
        )
        one.run(4), many.run(4)
        assert len(many.state.step.devices()) == 8
        for path, mask in one.memory["masks"].items():
            np.testing.assert_array_equal(many.memory["masks"][path], mask)
            np.testing.assert_allclose(
                many.params[path], one.params[path], rtol=1e-4, atol=1e-6
            )


def test_seeds_side_by_side_equal_seeds_alone(start):
    runs = [start(dynamic.rigl(sparsity=0.75, frequency=2), seed=s) for s in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(run.state for run in runs))
    step = jax.jit(jax.vmap(runs[0].step, in_axes=(0, None, None)))
    for _ in range(2):
        stacked, _ = step(stacked, runs[0].batch, ())
    for i, run in enumerate(runs):
        run.run(2)
        for path, mask in run.memory["masks"].items():
            together = stacked.collections["compression"]["masks"][path]
            np.testing.assert_array_equal(together[i], mask)
