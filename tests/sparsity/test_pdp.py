"""PDP: thresholds, soft masks, targets, the ramp, and the compression in the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import compression
from jaxkd.compression import After
from jaxkd.sparsity import pdp


def test_the_threshold_lies_between_what_stays_and_what_goes():
    sizes = jnp.asarray([4.0, 1.0, 3.0, 2.0])
    assert pdp.threshold(sizes, 0.5) == 2.5
    assert pdp.threshold(sizes, 0.25) == 1.5
    # The ends of the index: one stays at least, and one goes.
    assert pdp.threshold(sizes, 1.0) == 3.5
    assert pdp.threshold(sizes, 0.0) == 1.5
    rows = pdp.threshold(jnp.stack([sizes, 2 * sizes]), 0.5)
    np.testing.assert_array_equal(rows, [2.5, 5.0])
    with pytest.raises(ValueError, match="needs two magnitudes or more, got 1"):
        pdp.threshold(jnp.ones(1), 0.5)


def test_the_threshold_is_a_constant_of_the_gradient():
    kernel = jnp.asarray([0.3, 0.01, 0.02, 0.2])

    def loss(w):
        limit = jnp.broadcast_to(pdp.threshold(jnp.abs(w), 0.5), w.shape)
        return jnp.sum(pdp.soft_mask(jnp.square(w), limit, temperature=0.01) * w)

    limit = 0.11
    mask = 1 / (1 + np.exp(-(np.square(kernel) - limit**2) / 0.01))
    wanted = mask + 2 * np.square(kernel) / 0.01 * mask * (1 - mask)
    np.testing.assert_allclose(jax.grad(loss)(kernel), wanted, rtol=1e-5)


def test_masks_are_float32_whatever_the_weights_are():
    # The squares differ by less than bfloat16 tells apart.
    weights = jnp.asarray([0.0101, 0.0099], jnp.bfloat16)
    limit = jnp.full(2, 0.01)
    mask = pdp.soft_mask(jnp.square(weights.astype(jnp.float32)), limit)
    assert mask.dtype == jnp.float32
    squares = np.square(np.asarray(weights, np.float32))
    wanted = 1 / (1 + np.exp(-(squares - 1e-4) / 1e-4))
    np.testing.assert_allclose(mask, wanted, rtol=1e-5)


def test_a_tensor_of_zeros_gives_zero_and_half_the_gradient():
    def y(w):
        limit = jnp.broadcast_to(pdp.threshold(jnp.abs(w), 0.5), w.shape)
        return pdp.soft_mask(jnp.square(w), limit) * w

    value, back = jax.vjp(y, jnp.zeros(4))
    np.testing.assert_array_equal(value, np.zeros(4))
    np.testing.assert_allclose(back(jnp.ones(4))[0], np.full(4, 0.5))


def test_one_threshold_gives_layers_shares_of_their_own():
    layers = {"a": jnp.asarray([1.0, 2.0, 3.0, 4.0]), "b": jnp.asarray([10.0, 0.5])}
    targets = pdp.layer_targets(layers, 0.5)  # the fourth smallest is 3
    assert targets == {"a": 0.5, "b": 0.5}
    assert pdp.layer_targets(layers, 0.0) == {"a": 0.0, "b": 0.0}


def test_the_ramp_is_over_after_67_epochs():
    target = jnp.float32(0.8)
    assert pdp.ratio_at(-1, target) == 0
    np.testing.assert_allclose(pdp.ratio_at(0, target), 0.015 * 0.8, rtol=1e-6)
    assert pdp.ratio_at(65, target) < 0.8
    np.testing.assert_allclose(pdp.ratio_at(66, target), 0.8)
    np.testing.assert_allclose(pdp.ratio_at(1000, target), 0.8)


def test_groups_keep_n_of_m_input_channels():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 5))
    mask = pdp.hard_masks({"k": kernel}, {"k": 0.5}, structure="n:m", n=1, m=4)["k"]
    counts = np.asarray(mask).reshape(9, 2, 4, 5).sum(2)
    np.testing.assert_array_equal(counts, np.ones((9, 2, 5)))
    largest = np.abs(kernel).reshape(9, 2, 4, 5).argmax(2)
    np.testing.assert_array_equal(
        np.asarray(mask).reshape(9, 2, 4, 5).argmax(2), largest
    )
    with pytest.raises(ValueError, match="8 input channels are no multiple of m=3"):
        pdp.group_threshold(kernel, n=1, m=3)


def test_hard_masks_leave_what_is_not_pruned_yet():
    kernel = jnp.asarray([[3.0, -2.0], [1.0, 0.5]])
    masks = pdp.hard_masks({"a": kernel, "b": kernel}, {"a": 0.5, "b": 0.0})
    np.testing.assert_array_equal(masks["a"], [[True, True], [False, False]])
    assert masks["b"].all()
    channels = pdp.hard_masks({"a": kernel}, {"a": 0.5}, structure="channel")["a"]
    np.testing.assert_array_equal(channels, [True, False])


OPTIONS = dict(sparsity=0.5, warmup_epochs=1, epsilon=0.5)


def test_training_prunes_after_the_warm_up(start):
    run = start(compression.chain({"pdp": compression.create("pdp", **OPTIONS)}))
    structure = jax.tree.structure(run.state)
    run.run(3)
    memory = run.memory["pdp"]
    assert all(t == 0 for t in memory["targets"].values())
    assert run.metrics["facts"]["pdp/density"] == 1
    run.run(1)  # the end of the first epoch
    memory = run.memory["pdp"]
    kernels = {path: np.abs(run.params[path]) for path in memory["targets"]}
    every = np.sort(np.concatenate([x.ravel() for x in kernels.values()]))
    limit = every[int(0.5 * every.size)]
    for path, x in kernels.items():
        np.testing.assert_allclose(memory["targets"][path], (x < limit).mean())
        np.testing.assert_allclose(
            memory["ratios"][path], 0.5 * memory["targets"][path], rtol=1e-6
        )
    targets = memory["targets"]
    run.run(4)
    assert run.memory["pdp"]["targets"] == targets  # they stay
    np.testing.assert_allclose(
        list(run.memory["pdp"]["ratios"].values()), list(targets.values()), rtol=1e-6
    )
    assert run.metrics["facts"]["pdp/density"] == pytest.approx(0.5, abs=0.02)
    assert run.metrics["facts"]["pdp/target_density"] == 0.5
    assert jax.tree.structure(run.state) == structure
    final = run.student.upkeep.finalise(run.state.variables())
    assert "compression" not in final
    zeros = sum(
        int((np.asarray(compression.flatten(final["params"])[p]) == 0).sum())
        for p in targets
    )
    assert zeros / every.size == pytest.approx(0.5, abs=0.02)


def told(params, step, **changes):
    values = dict(
        params=params, gradients=params, key=jax.random.key(0), step=jnp.int32(step),
        steps_per_epoch=2, total_steps=10,
    )  # fmt: skip
    return After(**{**values, **changes})


PARAMS = {
    "stem/kernel": jnp.ones((3, 3, 1, 4)),
    "body/kernel": jax.random.normal(jax.random.key(1), (3, 3, 4, 8)),
    "thin/kernel": jax.random.normal(jax.random.key(2), (3, 3, 6, 8)),
    "body/bias": jnp.ones(8),
}


def test_without_a_warm_up_the_targets_are_those_of_the_start():
    part = compression.create("pdp", sparsity=0.5, warmup_epochs=0, epsilon=1.0)
    _, state = part.init(jax.random.key(0), PARAMS)
    assert set(state["targets"]) == {"body/kernel", "thin/kernel"}
    assert 0.4 < float(state["ratios"]["body/kernel"]) < 0.6
    params = part.effective({}, state, PARAMS)
    assert params["stem/kernel"] is PARAMS["stem/kernel"]
    assert params["body/bias"] is PARAMS["body/bias"]
    assert jnp.abs(params["body/kernel"]).min() < 1e-3
    gradient = jax.grad(
        lambda x: part.effective({}, state, {**PARAMS, "body/kernel": x})[
            "body/kernel"
        ].sum()
    )(PARAMS["body/kernel"])
    # Weights far below go on being pushed, however little.
    assert jnp.isfinite(gradient).all()


def test_groups_are_pruned_at_once_where_they_fit():
    part = compression.create("pdp", structure="n:m", n=2, m=4, warmup_epochs=1)
    _, state = part.init(jax.random.key(0), PARAMS)
    assert set(state["ratios"]) == {"body/kernel"}
    assert state["ratios"]["body/kernel"] == 0
    kept = part.effective({}, state, PARAMS)
    np.testing.assert_array_equal(kept["body/kernel"], PARAMS["body/kernel"])
    _, state = part.update({}, state, told(PARAMS, 1))
    assert state["ratios"]["body/kernel"] == 0.5
    final = part.final({}, state, PARAMS)["body/kernel"]
    assert (np.asarray(final) != 0).mean() == 0.5
    assert part.facts({}, state, PARAMS) == {"density": 0.5, "target_density": 0.5}


def test_channels_are_masked_with_all_that_follows_them(channel_network):
    part = compression.create(
        "pdp", sparsity=0.5, structure="channel", warmup_epochs=0, epsilon=1.0,
        temperature=1e-6,
    )  # fmt: skip
    with pytest.raises(ValueError, match="structure='channel' must know the network"):
        part.init(jax.random.key(0), PARAMS)
    net = channel_network
    part = part.fit(net.init, net.logits, net.shape)
    variables = net.variables
    params = compression.flatten(variables["params"])
    _, state = part.init(jax.random.key(0), params)
    assert set(state["ratios"]) == {"first/kernel", "hidden/kernel"}
    final = part.final({}, state, params)
    norms = np.sqrt(np.square(params["first/kernel"]).sum((0, 1, 2)))
    ratio = float(state["ratios"]["first/kernel"])
    gone = np.argsort(norms)[: round(ratio * len(norms))]
    assert len(gone)
    for name in ("first/kernel", "norm/scale", "norm/bias", "deep_norm/bias"):
        channels = np.abs(np.asarray(final[name])).reshape(-1, len(norms)).max(0)
        np.testing.assert_array_equal(np.flatnonzero(channels == 0), np.sort(gone))
    soft = part.effective({}, state, params)
    np.testing.assert_allclose(soft["norm/bias"], final["norm/bias"], atol=1e-3)


def test_seeds_are_pruned_side_by_side():
    part = compression.create("pdp", sparsity=0.5, warmup_epochs=0, epsilon=1.0)

    def run(seed):
        kernel = jax.random.normal(jax.random.key(seed), (3, 3, 4, 8))
        params = {"stem/kernel": jnp.ones((3, 3, 1, 4)), "body/kernel": kernel}
        _, state = part.init(jax.random.key(0), params)
        _, state = part.update({}, state, told(params, 0))
        return part.effective({}, state, params)["body/kernel"]

    both = jax.vmap(run)(jnp.arange(2))
    np.testing.assert_allclose(both[1], run(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sparsity=1.0), r"sparsity must be in \[0, 1\), got 1.0"),
        (dict(n=4, m=4), "n must be from 1 to m - 1, got n=4, m=4"),
        (dict(warmup_epochs=-1), "warmup_epochs must be >= 0"),
        (dict(epsilon=0.0), "epsilon must be finite and > 0"),
        (dict(temperature=0.0), "temperature must be finite and > 0"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        compression.create("pdp", **options)


def test_a_warm_up_as_long_as_the_stage_is_refused():
    part = compression.create("pdp", warmup_epochs=5)
    _, state = part.init(jax.random.key(0), PARAMS)
    with pytest.raises(ValueError, match="warmup_epochs=5 leaves nothing of the 5"):
        part.update({}, state, told(PARAMS, 0))
    params = {"stem/kernel": jnp.ones((3, 3, 1, 4)), "x/kernel": jnp.ones((6, 2))}
    part = compression.create("pdp", structure="n:m")
    with pytest.raises(ValueError, match="m=4 divides the input channels of no kernel"):
        part.init(jax.random.key(0), params)
    assert dataclasses.is_dataclass(part)
