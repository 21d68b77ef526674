"""Selection of records against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import select

LOSSES = np.array([0.3, 2.0, 0.1, 0.9, 2.0, 0.5], np.float32)


def test_hardest_takes_the_first_of_equals_and_what_is_no_number():
    assert select.hardest(jnp.asarray(LOSSES), 1).tolist() == [1]
    assert select.hardest(jnp.asarray(LOSSES), 3).tolist() == [1, 3, 4]
    broken = jnp.asarray(LOSSES).at[2].set(jnp.nan)
    assert select.hardest(broken, 2).tolist() == [1, 2]


def test_history_probability():
    history = np.array([0.0, 0.5, 1.0, np.nan, 2.0], np.float32)
    result = select.history_probability(jnp.asarray(LOSSES), jnp.asarray(history), 2.0)
    known = history[~np.isnan(history)]
    expected = [np.mean(known <= loss) ** 2 for loss in LOSSES]
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    empty = jnp.full(3, jnp.nan)
    np.testing.assert_array_equal(
        select.history_probability(jnp.asarray(LOSSES), empty, 2.0), np.ones(6)
    )


def test_loss_rank_probability():
    result = np.asarray(select.loss_rank_probability(jnp.asarray(LOSSES), 8.0))
    assert result.sum() == pytest.approx(1)
    ranks = np.argsort(np.argsort(-LOSSES, kind="stable"))
    np.testing.assert_allclose(result / result.max(), 8.0 ** (-ranks / 6), rtol=1e-5)
    even = select.loss_rank_probability(jnp.asarray(LOSSES), 1.0)
    np.testing.assert_allclose(even, np.full(6, 1 / 6), rtol=1e-6)


def test_el2n():
    logits = np.array([[2.0, 0.0], [0.0, 0.0], [-50.0, 50.0]], np.float32)
    result = select.el2n(jnp.asarray(logits), jnp.array([0, 1, 0]))
    share = 1 / (1 + np.exp(-2.0))
    expected = [np.sqrt(2) * (1 - share), np.sqrt(0.5), np.sqrt(2)]
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_ohem_is_the_mean_of_the_hardest_with_no_gradient_for_others(data):
    selection = select.ohem(keep=0.5)
    state = selection.init(jax.random.key(0), data)

    def loss(losses):
        weights = selection.weigh(state, losses, jax.random.key(0))
        return jnp.mean(jax.lax.stop_gradient(weights) * losses)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(LOSSES))
    assert value == pytest.approx((2.0 + 2.0 + 0.9) / 3)
    np.testing.assert_allclose(gradient, [0, 1 / 3, 0, 1 / 3, 1 / 3, 0], rtol=1e-6)
    assert (np.asarray(gradient) == 0).sum() == 3


def test_selective_backprop_selects_by_chance_and_keeps_a_history(data):
    selection = select.selective_backprop(beta=1.0, history=8)
    state = selection.init(jax.random.key(0), data)
    losses = jnp.asarray(LOSSES)
    # Without a history everything is selected.
    np.testing.assert_array_equal(
        selection.weigh(state, losses, jax.random.key(0)), np.ones(6)
    )
    state = selection.record(state, jnp.arange(6), losses, jnp.int32(0))
    chance = np.asarray(select.history_probability(losses, state["history"], 1.0))
    keys = jax.random.split(jax.random.key(1), 2000)
    weights = np.asarray(jax.vmap(lambda k: selection.weigh(state, losses, k))(keys))
    np.testing.assert_allclose((weights > 0).mean(0), chance, atol=0.05)
    # The mean over the selected: weights of a batch add up to its size.
    np.testing.assert_allclose(weights.sum(1), np.full(2000, 6), rtol=1e-5)
    # The oldest losses give way to new ones.
    state = selection.record(state, jnp.arange(6), losses + 10, jnp.int32(1))
    history = np.full(8, np.nan, np.float32)
    for i, value in enumerate([*LOSSES, *(LOSSES + 10)]):
        history[i % 8] = value
    np.testing.assert_array_equal(state["history"], history)
    assert state["next"] == 4


def test_a_batch_larger_than_the_history_leaves_its_last_losses(data):
    selection = select.selective_backprop(history=2)
    state = selection.init(jax.random.key(0), data)
    state = selection.record(state, jnp.arange(6), jnp.asarray(LOSSES), jnp.int32(0))
    np.testing.assert_array_equal(np.sort(state["history"]), np.sort(LOSSES[-2:]))


def test_proxy_keeps_the_hardest(data):
    selection = select.proxy(keep=0.5, network="small")
    selection.init(jax.random.key(0), data)
    assert selection.scorer == "small"
    assert selection.keep(jnp.asarray(LOSSES)).tolist() == [1, 3, 4]


def test_loss_rank_visits_everything_once_and_then_the_hardest_more_often(data):
    selection = select.loss_rank(pressure=1e4, end_pressure=1e4)
    state = selection.init(jax.random.key(0), data)
    record = jax.jit(selection.record)
    seen = []
    for step in range(20):
        numbers = selection.pick(state)
        upcoming, count = selection.upcoming(state)
        np.testing.assert_array_equal(upcoming[0], numbers)
        assert count == 5 - step % 5
        seen.append(np.asarray(numbers))
        state = record(state, numbers, numbers.astype(jnp.float32), jnp.int32(step))
    first = np.concatenate(seen[:5])
    assert len(np.unique(first)) == 20
    unseen = np.setdiff1d(np.arange(23), first)
    later = np.concatenate(seen[5:])
    # Large numbers have large losses, and those never seen come first.
    assert np.isin(unseen, later).all()
    assert later.mean() > first.mean() + 3


def test_the_pressure_falls_and_rankings_may_be_rare(data):
    selection = select.loss_rank(pressure=100.0, end_pressure=1.0, every_epochs=2)
    state = selection.init(jax.random.key(0), data)
    spreads = []
    for step in range(20):
        numbers = selection.pick(state)
        if step % 5 == 0:
            chance = np.asarray(state["chance"])
            spreads.append(chance.max() / chance.min())
        state = selection.record(
            state, numbers, numbers.astype(jnp.float32), jnp.int32(step)
        )
    assert spreads[0] == pytest.approx(1)
    assert spreads[1] == pytest.approx(100 ** (22 / 23), rel=1e-3)
    assert spreads[2] == spreads[1]  # not ranked anew
    assert spreads[3] == pytest.approx(1, rel=1e-3)


def test_pruning_visits_the_kept_records_alone(data):
    selection = select.prune(raters=("early",), keep=0.6)
    state = selection.init(jax.random.key(0), data)
    scores = jnp.asarray(np.random.default_rng(0).permutation(23), jnp.float32)
    state = selection.begin(state, scores)
    kept = set(np.argsort(-np.asarray(scores))[:13].tolist())
    passes = []
    for step in range(6):
        numbers = selection.pick(state)
        upcoming, count = selection.upcoming(state)
        np.testing.assert_array_equal(upcoming[0], numbers)
        assert count == 3 - step % 3
        passes.append(np.asarray(numbers))
        state = selection.record(state, numbers, jnp.zeros(4), jnp.int32(step))
    first, second = np.concatenate(passes[:3]), np.concatenate(passes[3:])
    assert len(set(first)) == len(set(second)) == 12
    assert set(first) <= kept and (first != second).any()
    assert selection.facts(state)["data_used"] == pytest.approx(13 / 23)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: select.ohem(keep=0.0), "keep must be above 0"),
        (lambda: select.proxy(keep=1.5), "keep must be above 0"),
        (lambda: select.prune(raters=("a",), keep=2.0), "keep must be above 0"),
        (lambda: select.prune(raters=()), "raters names no network"),
        (lambda: select.selective_backprop(beta=0.0), "beta must be positive"),
        (lambda: select.selective_backprop(history=0), "history must be at least 1"),
        (lambda: select.loss_rank(pressure=0.5), "pressure must be at least 1"),
        (lambda: select.loss_rank(end_pressure=0.0), "end_pressure must be at least 1"),
        (lambda: select.loss_rank(every_epochs=0), "every_epochs must be at least 1"),
    ],
)
def test_impossible_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (select.ohem(keep=0.2), "keep 0.2 of a batch of 4 leaves no record"),
        (select.proxy(keep=0.2), "keep 0.2 of a batch of 4 leaves no record"),
        (select.prune(raters=("a",), keep=0.1), "leaves 2, less than a batch of 4"),
    ],
)
def test_shares_too_small_for_the_data(data, selection, message):
    with pytest.raises(ValueError, match=message):
        selection.init(jax.random.key(0), data)


def test_names():
    assert {"hard_batches", "loss_rank", "ohem", "prune", "proxy"} <= set(
        select.names()
    )
    with pytest.raises(KeyError, match="did you mean 'ohem'"):
        select.create("ohm")
    with pytest.raises(TypeError, match="must return a jaxkd.select.Selection"):
        select.create("fractions:Fraction")
