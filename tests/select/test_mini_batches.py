"""Hard mini-batches against a plain list and sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.select import SelectionData, hard_batches


def reference(losses_of, *, batches, delta, steps):
    """The published loop: a list of (loss, batch), sorted in place by every pass.

    `losses_of(step, batch)` is the loss that is measured.
    """
    noted = [[losses_of(i, i), i] for i in range(batches)]
    visited, step = list(range(batches)), batches
    while step < steps:
        noted.sort(key=lambda pair: -pair[0])
        for batch in sorted(i for _, i in noted[: int(delta * batches)]):
            if step == steps:
                break
            loss = losses_of(step, batch)
            for pair in noted:
                if pair[1] == batch:
                    pair[0] = loss
            visited.append(batch)
            step += 1
    return visited[:steps]


def run(selection, data, losses_of, steps, key=0):
    """The batches that a selection visits, and its last state."""
    state = selection.init(jax.random.key(key), data)
    table = np.asarray(state["numbers"])

    @jax.jit
    def advance(state, loss, step):
        numbers = selection.pick(state)
        losses = jnp.full(data.batch_size, loss)
        return selection.record(state, numbers, losses, step), numbers

    visited = []
    for step in range(steps):
        numbers = np.asarray(selection.pick(state))
        (batch,) = np.flatnonzero((table == numbers).all(axis=1))
        visited.append(int(batch))
        loss = jnp.float32(losses_of(step, int(batch)))
        state, _ = advance(state, loss, jnp.int32(step))
    return visited, state


@pytest.mark.parametrize("delta", [0.2, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_visits_are_those_of_the_published_loop(delta, ties):
    data = SelectionData(records=43, batch_size=4, steps_per_epoch=10, epochs=4)
    table = np.random.default_rng(0).normal(size=(40, 10))
    if ties:
        table = np.round(table)

    def losses_of(step, batch):
        return float(np.float32(table[step, batch]))

    visited, _ = run(hard_batches(delta=delta), data, losses_of, 40)
    assert visited == reference(losses_of, batches=10, delta=delta, steps=40)
    if delta == 1:
        assert visited == list(range(10)) * 4


def test_batches_are_fixed_and_of_consecutive_records(data):
    state = hard_batches(delta=0.5).init(jax.random.key(0), data)
    np.testing.assert_array_equal(state["numbers"], np.arange(20).reshape(5, 4))
    drawn = hard_batches(delta=0.5, shuffle=True)
    one, two = (drawn.init(jax.random.key(i), data)["numbers"] for i in (1, 2))
    assert (one != two).any() and len(np.unique(one)) == 20
    np.testing.assert_array_equal(one, drawn.init(jax.random.key(1), data)["numbers"])


def test_a_loss_that_is_no_number_is_the_largest(data):
    def losses_of(step, batch):
        return np.nan if batch == 3 and step < 5 else float(batch == 1)

    visited, _ = run(hard_batches(delta=0.4), data, losses_of, 9)
    assert visited == [0, 1, 2, 3, 4, 1, 3, 1, 3]


def test_upcoming_steps_are_those_that_follow(data):
    selection = hard_batches(delta=0.6)
    state = selection.init(jax.random.key(0), data)
    for step in range(14):
        numbers, count = selection.upcoming(state)
        # First pass 5 batches, later passes 3.
        expected = 5 - step if step < 5 else 3 - (step - 5) % 3
        assert count == expected
        np.testing.assert_array_equal(numbers[0], selection.pick(state))
        follow = state
        for i in range(int(count)):
            np.testing.assert_array_equal(numbers[i], selection.pick(follow))
            follow = selection.record(
                follow, numbers[i], jnp.full(4, float(i)), jnp.int32(step + i)
            )
        losses = jnp.full(4, float(step % 4))
        state = selection.record(state, selection.pick(state), losses, jnp.int32(step))


def test_it_tells_how_much_of_the_data_an_epoch_used(data):
    selection = hard_batches(delta=0.2)
    _, state = run(selection, data, lambda step, batch: 1.0 + batch, 5)
    assert selection.facts(state)["data_used"] == 1
    _, state = run(selection, data, lambda step, batch: 1.0 + batch, 10)
    assert selection.facts(state)["data_used"] == pytest.approx(0.2)


def test_several_seeds_at_once(data):
    selection = hard_batches(delta=0.4, shuffle=True)
    states = jax.vmap(lambda key: selection.init(key, data))(
        jax.random.split(jax.random.key(0), 2)
    )
    record = jax.jit(jax.vmap(selection.record, in_axes=(0, 0, 0, None)))
    for step in range(6):
        numbers = jax.vmap(selection.pick)(states)
        losses = jnp.stack([numbers[0] * 1.0, -numbers[1] * 1.0])
        states = record(states, numbers, losses, jnp.int32(step))
    alone = selection.init(jax.random.split(jax.random.key(0), 2)[1], data)
    for step in range(6):
        numbers = selection.pick(alone)
        alone = selection.record(alone, numbers, -numbers * 1.0, jnp.int32(step))
    for one, two in zip(
        jax.tree.leaves(alone), jax.tree.leaves(states), strict=True
    ):  # fmt: skip
        np.testing.assert_array_equal(one, two[1])


@pytest.mark.parametrize("delta", [0.0, -0.1, 1.2, float("nan")])
def test_impossible_shares(delta):
    with pytest.raises(ValueError, match="delta must be above 0 and at most 1"):
        hard_batches(delta=delta)


def test_a_share_that_leaves_no_batch(data):
    with pytest.raises(ValueError, match="delta 0.1 of 5 batches leaves none"):
        hard_batches(delta=0.1).init(jax.random.key(0), data)
