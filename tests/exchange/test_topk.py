"""Deep Gradient Compression: against numpy, on workers, and what it sends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd.analysis.collectives import read_collectives, sum_up
from jaxkd.exchange import create, dgc, warmup
from jaxkd.exchange.topk import (
    above_threshold,
    bytes_gathered,
    clipped,
    count_sent,
    largest,
    sample_sizes,
)

KEY = jax.random.key(0)


def reference(gradients, *, ratio, mu, nesterov, masking, steps):
    """What n workers apply to one tensor, in numpy, worker by worker."""
    workers, size = gradients[0].shape
    count = int(np.ceil(ratio * size))
    m, v = np.zeros((workers, size)), np.zeros((workers, size))
    results = []
    for step in range(steps):
        total = np.zeros(size)
        for w in range(workers):
            g = gradients[step][w].astype(np.float64)
            if nesterov:
                m[w] = mu * (m[w] + g)
                v[w] += m[w] + g
            else:
                m[w] = mu * m[w] + g
                v[w] += m[w]
            chosen = np.argsort(-np.abs(v[w]), kind="stable")[:count]
            total[chosen] += v[w][chosen]
            v[w][chosen] = 0
            if masking:
                m[w][chosen] = 0
        results.append(total / workers)
    return results, m, v


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("masking", [False, True])
def test_workers_apply_what_the_reference_says(workers, copies, nesterov, masking):
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=(4, 60)).astype(np.float32) for _ in range(4)]
    want, m, v = reference(
        gradients, ratio=0.1, mu=0.9, nesterov=nesterov, masking=masking, steps=4
    )
    exchange = dgc(ratio=0.1, momentum=0.9, nesterov=nesterov, momentum_masking=masking)
    step = workers(exchange)
    state = copies(exchange.init({"k": jnp.zeros((6, 10))}), 4)
    for i, g in enumerate(gradients):
        new, state = step({"k": jnp.asarray(g.reshape(4, 6, 10))}, state, i, KEY)
        assert (new["k"] == new["k"][0][None]).all()
        np.testing.assert_allclose(new["k"][0].ravel(), want[i], atol=1e-5)
    np.testing.assert_allclose(state.momentum["k"].reshape(4, -1), m, atol=1e-5)
    np.testing.assert_allclose(state.unsent["k"].reshape(4, -1), v, atol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_ratio_one_is_sgd_with_momentum_on_eight_devices(
    params, drawn, copies, on_devices, nesterov
):
    exchange = dgc(ratio=1.0, momentum=0.9, nesterov=nesterov)
    state = copies(exchange.init(params))
    step = on_devices(exchange, drawn(0), state, 0, KEY)
    tx = optax.trace(0.9, nesterov=nesterov)
    plain = tx.init(params)
    for i in range(3):
        gradients = drawn(i)
        mean = jax.tree.map(lambda g: g.mean(0), gradients)
        want, plain = tx.update(mean, plain)
        new, state = step(gradients, state, i, KEY)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_biases_are_averaged_whole_with_their_own_momentum(
    params, drawn, copies, workers
):
    exchange = dgc(ratio=0.01, momentum=0.5)
    step, state = workers(exchange), copies(exchange.init(params))
    assert "conv/bias" not in state.unsent
    total = 0.0
    for i in range(3):
        gradients = drawn(i)
        new, state = step(gradients, state, i, KEY)
        total = 0.5 * total + gradients["conv"]["bias"].mean(0)
        np.testing.assert_allclose(new["conv"]["bias"][0], total, rtol=1e-5, atol=1e-6)


def test_nothing_is_lost_without_momentum(params, drawn, copies, workers):
    exchange = dgc(ratio=0.05, momentum=0.0)
    step, state = workers(exchange), copies(exchange.init(params))
    applied, given = jnp.zeros((40, 30)), jnp.zeros((40, 30))
    for i in range(4):
        gradients = drawn(i)
        new, state = step(gradients, state, i, KEY)
        applied += new["head"]["kernel"][0]
        given += gradients["head"]["kernel"].mean(0)
    rest = state.unsent["head/kernel"].mean(0)
    np.testing.assert_allclose(applied + rest, given, atol=1e-5)
    # Each worker sends 60 of 1200 numbers, wherever the others do.
    assert 60 <= np.count_nonzero(new["head"]["kernel"][0]) <= 8 * 60


@pytest.mark.parametrize(
    ("options", "value_bytes"), [({}, 4), ({"values": "float16"}, 2)]
)
def test_bytes_of_the_compiled_exchange_are_those_counted_by_hand(
    params, drawn, copies, on_devices, options, value_bytes
):
    exchange = dgc(ratio=0.05, **options)
    program = on_devices(exchange, drawn(0), copies(exchange.init(params)), 0, KEY)
    found = sum_up(read_collectives(program))
    # 15 of 288 and 60 of 1200: values and int32 places of each of 8 devices.
    hand = 8 * (15 + 60) * (value_bytes + 4)
    assert found["all-gather"].bytes == hand
    assert hand == bytes_gathered(
        [288, 1200], ratio=0.05, devices=8, value_bytes=value_bytes
    )
    # The bias, and whether all numbers are finite.
    assert found["all-reduce"].bytes == 4 * 8 + 4
    assert set(found) == {"all-gather", "all-reduce"}


def test_float16_rounds_and_bounds_what_is_sent(copies, workers):
    exchange = dgc(ratio=1 / 3, values="float16", momentum=0.0)
    state = copies(exchange.init({"k": jnp.zeros((1, 3))}), 1)
    gradients = {"k": jnp.asarray([[[0.0, 1e6, 1.0]]])}
    new, state = workers(exchange)(gradients, state, 0, KEY)
    np.testing.assert_array_equal(new["k"][0], [[0, 65504, 0]])
    np.testing.assert_array_equal(state.unsent["k"][0], [[0, 0, 1.0]])


def test_one_gradient_that_is_not_finite_leaves_the_step_out(
    params, drawn, copies, workers
):
    exchange = dgc(ratio=0.1)
    step, state = workers(exchange), copies(exchange.init(params))
    _, state = step(drawn(0), state, 0, KEY)
    broken = drawn(1)
    broken["conv"]["bias"] = broken["conv"]["bias"].at[3, 2].set(jnp.nan)
    new, after = step(broken, state, 1, KEY)
    assert all((x == 0).all() for x in jax.tree.leaves(new))
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_warmup_ratios_take_effect_by_epoch(copies, workers):
    exchange = dgc(ratio=0.1, momentum=0.0, warmup_ratios=(1.0, 0.5), steps_per_epoch=2)
    step, state = workers(exchange), copies(exchange.init({"k": jnp.zeros((2, 10))}), 1)
    rng = np.random.default_rng(0)
    sent = []
    for i in range(6):
        gradients = {"k": jnp.asarray(rng.normal(size=(1, 2, 10)), jnp.float32)}
        new, state = step(gradients, state, i, KEY)
        sent.append(np.count_nonzero(new["k"]))
    assert sent == [20, 20, 10, 10, 2, 2]


def test_the_ratios_of_the_warmup():
    np.testing.assert_allclose(
        warmup(0.001, 5), [10**-0.5, 0.1, 10**-1.5, 0.01, 10**-2.5], rtol=1e-12
    )
    assert warmup(0.1, 0) == []
    with pytest.raises(ValueError, match="warmup_epochs must be >= 0, got -1"):
        warmup(0.1, -1)


def test_clipping_is_of_all_or_of_each():
    arrays = {"a": jnp.full((3,), 2.0), "b": jnp.full((4,), 0.1)}
    total = np.sqrt(12 + 0.04)
    both = clipped(arrays, 1.0, each=False)
    np.testing.assert_allclose(both["b"], 0.1 / total, rtol=1e-6)
    each = clipped(arrays, 1.0, each=True)
    np.testing.assert_allclose(np.linalg.norm(each["a"]), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(each["b"], arrays["b"])


def test_a_device_clips_its_own_gradient_before_it_gathers(copies, workers):
    exchange = dgc(ratio=1.0, momentum=0.0, clip_norm=1.0)
    state = copies(exchange.init({"k": jnp.zeros((1, 2))}), 2)
    gradients = {"k": jnp.asarray([[[3.0, 4.0]], [[0.0, 0.5]]])}
    new, _ = workers(exchange)(gradients, state, 0, KEY)
    np.testing.assert_allclose(new["k"][0], [[0.3, 0.65]], rtol=1e-6)


def test_ties_take_the_first_and_zeros_are_harmless():
    places, sent = largest(jnp.asarray([1.0, -1.0, 1.0, 0.5]), ratio=0.5)
    np.testing.assert_array_equal(places, [0, 1])
    np.testing.assert_array_equal(sent, [1, -1])
    places, sent = largest(jnp.zeros((4, 5)), ratio=0.1)
    np.testing.assert_array_equal(places, [0, 1])
    assert (sent == 0).all()
    assert count_sent(5, 0.001) == 1


def test_a_sampled_threshold_takes_about_the_largest():
    x = jax.random.normal(jax.random.key(3), (200, 100))
    places, sent = jax.jit(
        lambda x: above_threshold(x, ratio=0.01, sample_ratio=0.05, key=KEY)
    )(x)
    flat = np.asarray(x).ravel()
    inside = np.asarray(places) < flat.size
    assert len(places) == 200 and 160 <= inside.sum()
    np.testing.assert_array_equal(np.asarray(sent)[inside], flat[places[inside]])
    assert (np.asarray(sent)[~inside] == 0).all()
    assert len(set(places[inside].tolist())) == inside.sum()
    cut = np.sort(np.abs(flat))[-260]  # 1.3 times as many may pass
    assert (np.abs(np.asarray(sent)[inside]) >= cut).all()


def test_a_threshold_that_lets_too_many_pass_falls_back_on_the_largest():
    # The sample sees none of the many large numbers, which lie between its places.
    stride, samples = sample_sizes(10_000, ratio=0.01, sample_ratio=0.02)
    start = int(jax.random.randint(KEY, (), 0, stride))
    flat = np.linspace(100, 200, 10_000, dtype=np.float32)
    flat[start + stride * np.arange(samples)] = 1.0
    x = jnp.asarray(flat)
    places, sent = above_threshold(x, ratio=0.01, sample_ratio=0.02, key=KEY)
    want, values = largest(x, ratio=0.01)
    np.testing.assert_array_equal(places, want)
    np.testing.assert_array_equal(sent, values)


def test_a_threshold_that_lets_too_few_pass_is_lowered():
    stride, samples = sample_sizes(10_000, ratio=0.01, sample_ratio=0.02)
    start = int(jax.random.randint(KEY, (), 0, stride))
    flat = np.full(10_000, 1.0, np.float32)
    flat[start + stride * np.arange(samples)] = 1.2
    places, sent = above_threshold(
        jnp.asarray(flat), ratio=0.03, sample_ratio=0.02, key=KEY
    )
    # All of the sample pass at first, which are too few; then everything does.
    assert (np.asarray(sent) >= 1.0).all() and (places < 10_000).all()


@pytest.mark.parametrize("size", [10, 500, 5_000, 100_000])
def test_the_sample_has_an_odd_stride_and_enough_numbers(size):
    stride, samples = sample_sizes(size, ratio=0.01, sample_ratio=0.01)
    assert stride % 2 == 1 and stride * samples <= size
    assert samples >= min(size, 200) or samples == size


def test_sampled_selection_in_the_exchange(params, drawn, copies, workers):
    exchange = dgc(ratio=0.05, momentum=0.0, selection="sampled", sample_ratio=0.1)
    step, state = workers(exchange), copies(exchange.init(params))
    gradients = drawn(0)
    new, state = step(gradients, state, 0, KEY)
    rest = state.unsent["head/kernel"].mean(0)
    np.testing.assert_allclose(
        new["head"]["kernel"][0] + rest, gradients["head"]["kernel"].mean(0), atol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio must be > 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0"),
        ({"sample_ratio": 2.0}, r"sample_ratio must be in \(0, 1\]"),
        ({"warmup_epochs": 1, "warmup_ratios": (0.1,)}, "exclude each other"),
        ({"warmup_ratios": (2.0,)}, r"warmup_ratios must be in \(0, 1\]"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be >= 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dgc(**options)


def test_a_ratio_above_one_is_one_in_so_many(copies, workers):
    exchange = create("dgc", ratio=10.0, momentum=0.0)
    state = copies(exchange.init({"k": jnp.zeros((2, 10))}), 1)
    new, _ = workers(exchange)({"k": jnp.ones((1, 2, 10))}, state, 0, KEY)
    assert np.count_nonzero(new["k"]) == 2
    with pytest.raises(ValueError, match="two axes or more"):
        exchange.init({"bias": jnp.zeros(3)})
