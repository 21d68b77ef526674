"""LAPP: surrogate masks, arithmetic that is left, and the compression at work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import compression
from jaxkd.compression import After, flatten, unflatten
from jaxkd.sparsity import lapp
from jaxkd.sparsity.shrink import open_channels


def test_masks_are_hard_and_their_gradients_those_of_a_sigmoid():
    scores = jnp.asarray([0.5, 0.3, 0.1])
    value, back = jax.vjp(
        lambda s, t: lapp.threshold_mask(s, t, temperature=0.1),
        scores,
        jnp.float32(0.3),
    )
    np.testing.assert_array_equal(value, [1, 0, 0])
    soft = 1 / (1 + np.exp(-(np.asarray(scores) - 0.3) / 0.1))
    slope = soft * (1 - soft) / 0.1
    by_score, by_limit = back(jnp.ones(3))
    np.testing.assert_allclose(by_score, slope, rtol=1e-5)
    np.testing.assert_allclose(by_limit, -slope.sum(), rtol=1e-5)


def test_arithmetic_that_is_left():
    macs = {"a": 100.0, "b": 300.0}
    half, whole = jnp.float32(0.5), jnp.float32(1.0)
    share = lapp.flops_share(macs, {"b": half}, {"a": half, "b": whole})
    np.testing.assert_allclose(share, (50 + 150) / 400)
    np.testing.assert_allclose(lapp.flops_loss(share, 0.25), np.log(2), rtol=1e-6)
    assert lapp.flops_loss(share, 0.6) == 0
    assert jax.grad(lapp.flops_loss)(share, 0.6) == 0


@pytest.fixture(scope="module")
def fitted(channel_network):
    net = channel_network

    def make(**options):
        part = compression.create("lapp", **options)
        return part.fit(net.init, net.logits, net.shape)

    return make


@pytest.fixture
def params(channel_network):
    return flatten(channel_network.variables["params"])


def after(params):
    return After(
        params=params, gradients=params, key=jax.random.key(0), step=jnp.int32(0),
        steps_per_epoch=1, total_steps=10,
    )  # fmt: skip


def limits(part, params, **values):
    learned, state = part.init(jax.random.key(0), params)
    learned = {path: jnp.asarray(values.get(path, 0.0)) for path in learned}
    return learned, state


def test_nothing_is_pruned_at_the_start(fitted, params):
    part = fitted(flops=0.5)
    learned, state = part.init(jax.random.key(0), params)
    assert set(learned) == {"first", "hidden"}
    new = part.effective(learned, state, params)
    for name, x in params.items():
        np.testing.assert_array_equal(new[name], x)
    facts = part.facts(learned, state, params)
    assert facts["flops_share"] == pytest.approx(1) and facts["frozen"] == 0
    terms = part.terms(learned, state, params)
    np.testing.assert_allclose(terms["flops"], np.log(2), rtol=1e-5)
    gradient = jax.grad(lambda x: part.terms(x, state, params)["flops"])(learned)
    assert gradient["first"] < 0  # thresholds rise


def test_a_threshold_closes_channels_wherever_they_go(fitted, params):
    part = fitted(flops=0.01, threshold_scale=2.0)
    params["norm/scale"] = jnp.asarray([0.1, -2.0, 0.3, 0.9, 1.5, 0.2])
    learned, state = limits(part, params, first=0.4)  # the limit is 0.8
    new = part.effective(learned, state, params)
    stay = np.asarray([0, 1, 0, 1, 1, 0], bool)
    for name in ("norm/scale", "norm/bias", "deep_norm/scale", "deep_norm/bias"):
        np.testing.assert_array_equal(np.asarray(new[name]) != 0, stay)
    # first: half of its outputs; deep: half; hidden: half of its inputs.
    macs = {"first": 6 * 6 * 9 * 3 * 6, "deep": 6 * 6 * 9 * 6, "hidden": 30}
    total = sum(macs.values()) + 15
    np.testing.assert_allclose(
        part.facts(learned, state, params)["flops_share"],
        (sum(macs.values()) / 2 + 15) / total,
        rtol=1e-5,
    )
    gradient = jax.grad(lambda x: part.effective(x, state, params)["norm/bias"].sum())(
        learned
    )
    assert jnp.isfinite(gradient["first"]) and gradient["first"] != 0


def test_every_layer_keeps_its_best_channel(fitted, params):
    part = fitted(flops=0.01)
    params["norm/scale"] = jnp.asarray([0.1, -2.0, 0.3, 0.9, 1.5, 0.2])
    learned, state = limits(part, params, first=100.0, hidden=100.0)
    new = part.effective(learned, state, params)
    np.testing.assert_array_equal(np.flatnonzero(new["norm/scale"]), [1])
    columns = np.abs(np.asarray(new["hidden/kernel"])).max(0)
    sums = np.abs(np.asarray(params["hidden/kernel"])).sum(0)
    np.testing.assert_array_equal(np.flatnonzero(columns), [sums.argmax()])


def test_masks_are_kept_once_the_target_is_reached(fitted, params, channel_network):
    part = fitted(flops=0.6)
    params["norm/scale"] = jnp.asarray([0.1, -2.0, 0.3, 0.9, 1.5, 0.2])
    learned, state = limits(part, params)
    _, state = part.update(learned, state, after(params))
    assert not state["frozen"] and all(m.all() for m in part.masks(state).values())
    learned["first"] = jnp.float32(0.08)  # times 10
    _, state = part.update(learned, state, after(params))
    assert state["frozen"]
    stay = np.asarray([0, 1, 0, 1, 1, 0], bool)
    # Neither scores nor thresholds change them any more.
    params["norm/scale"] = jnp.ones(6)
    learned["first"] = jnp.float32(0.0)
    _, state = part.update(learned, state, after(params))
    np.testing.assert_array_equal(state["masks"]["first"], stay)
    assert part.terms(learned, state, params)["flops"] == 0
    masks = part.masks(state)
    assert masks["first/kernel"].shape == (1, 1, 1, 6)
    np.testing.assert_array_equal(masks["first/kernel"].reshape(-1), stay)
    final = part.final(learned, state, params)
    net = channel_network
    variables = {
        **net.variables, "params": unflatten(final, net.variables["params"])
    }  # fmt: skip
    np.testing.assert_array_equal(open_channels(net.channels, variables)["first"], stay)
    # What is computed while it learns is what is left in the end.
    now = part.effective(learned, state, params)
    images = jax.random.normal(jax.random.key(0), (2, *net.shape))
    own = {**variables, "params": unflatten(now, net.variables["params"])}
    np.testing.assert_allclose(
        net.logits(own, images), net.logits(variables, images), rtol=1e-5, atol=1e-6
    )


def test_a_bypass_lies_beside_pruned_convolutions(channel_network):
    net = channel_network
    part = compression.create("lapp", flops=0.5, bypass=True)
    part = part.fit(net.init, net.logits, net.shape)
    with part.layers(False):
        variables = jax.eval_shape(lambda key: net.init(key), jax.random.key(0))
    first = variables["params"]["first"]
    assert first["bypass_depthwise"]["kernel"].shape == (3, 3, 1, 3)
    assert first["bypass_pointwise"]["kernel"].shape == (1, 1, 3, 6)
    assert "bypass_depthwise" not in variables["params"]["deep"]
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), variables["params"])
    params = flatten(ones)
    learned, state = part.init(jax.random.key(0), params)
    assert set(learned) == {"first"}
    learned["first"] = jnp.float32(100.0)
    new = part.effective(learned, state, params)
    assert (np.asarray(new["norm/scale"]) == 1).all()
    assert np.asarray(new["first/kernel"]).any((0, 1, 2)).sum() == 1
    # Kernel, its bypass, and layers whose inputs are all there.
    pixels, others = 36, 36 * 9 * 6 + 30 + 15
    dense = pixels * 9 * 3 * 6
    left = dense / 6 + pixels * 3 * (9 + 6) + others
    np.testing.assert_allclose(
        part.facts(learned, state, params)["flops_share"],
        left / (dense + others),
        rtol=1e-5,
    )


def test_it_trains_in_the_step(start_deep):
    run = start_deep(
        compression.create("lapp", flops=0.7, weight=5.0, threshold_scale=20.0)
    )
    structure = jax.tree.structure(run.state)
    run.run(2)
    assert jax.tree.structure(run.state) == structure
    assert run.metrics["terms"]["flops"] > 0
    assert run.state.params["network"]["compression"]["first"] > 0
    for _ in range(60):
        run.run(1)
        if run.metrics["facts"]["frozen"]:
            break
    assert run.metrics["facts"]["frozen"] == 1
    assert run.metrics["facts"]["flops_share"] <= 0.7
    closed = ~run.memory["masks"]["first"]
    run.run(2)
    assert closed.any() and not closed.all()
    assert (run.params["norm/scale"][closed] == 0).all()
    assert (run.moments["network/norm/scale"][closed] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(flops=1.0), r"flops must be in \(0, 1\), got 1.0"),
        (dict(weight=0.0), "weight must be finite and > 0"),
        (dict(temperature=-1.0), "temperature must be finite and > 0"),
        (dict(threshold_scale=0.0), "threshold_scale must be finite and > 0"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        compression.create("lapp", **options)


def test_it_must_know_the_network(params):
    with pytest.raises(ValueError, match="lapp must know the network"):
        compression.create("lapp").init(jax.random.key(0), params)
    part = compression.create("lapp")
    with pytest.raises(ValueError, match="no channels of this network"):
        part.fit(lambda key: {"params": {}}, lambda v, x: x.mean((1, 2)), (4, 4, 3))
