"""Lottery tickets: rounds, rewinding, counts."""

import jax
import numpy as np
import pytest

from jaxkd import compression
from jaxkd.sparsity import lottery as lottery_lib
from jaxkd.training import Plan, make_setup
from jaxkd.training.schema import ConfigError

SIZES = {"body/kernel": 288, "hidden/kernel": 128}


def trace(run, steps):
    """Runs and returns parameters and masks after every step."""
    found = []
    for _ in range(steps):
        run.run()
        found.append((run.params, run.memory["masks"]))
    return found


@pytest.mark.parametrize("distribution", ["global", "uniform"])
def test_rounds_prune_and_rewind(start, distribution):
    run = start(
        compression.create(
            "lottery", rate=0.5, rounds=2, rewind_epoch=1.0, distribution=distribution
        ),
        epochs=6,
        steps_per_epoch=2,
    )
    structure = jax.tree.structure(run.state)
    after = trace(run, 12)
    assert jax.tree.structure(run.state) == structure
    # Stored at step 2; of 12 steps, rounds end after steps 4 and 8.
    stored = after[1][0]
    for t, (params, masks) in enumerate(after, 1):
        rounds = (t >= 4) + (t >= 8)
        total = sum(m.sum() for m in masks.values())
        assert total == {0: 416, 1: 208, 2: 104}[rounds]
        if distribution == "uniform":
            assert masks["body/kernel"].sum() == 288 // 2**rounds
        if t in (4, 8):
            for path, value in params.items():
                mask = masks.get(path, np.True_)
                np.testing.assert_array_equal(value, np.where(mask, stored[path], 0))
    for t in (4, 8):
        # Pruned by the weights that training had reached, not by the stored ones.
        before, now = after[t - 2], after[t - 1]
        for path, mask in now[1].items():
            assert not (mask & ~before[1][path]).any()
            assert (
                run.moments[f"network/{path}"][~run.memory["masks"][path]] == 0
            ).all()
    assert run.metrics["facts"]["density"] == run.metrics["facts"]["target_density"]


def test_masks_are_those_of_the_trained_weights(start):
    options = dict(rate=0.5, prune_epochs=[3], rewind_epoch=0, distribution="uniform")
    pruned = start(compression.create("lottery", **options))
    first = pruned.params
    # The same training without pruning: step 12 of both sees the same weights.
    plain = start(compression.create("static", sparsity=0.0))
    pruned.run(12), plain.run(12)
    for path, mask in pruned.memory["masks"].items():
        size = np.abs(plain.params[path])
        assert mask.sum() == SIZES[path] // 2
        assert size[mask].min() >= size[~mask].max()
        np.testing.assert_array_equal(
            pruned.params[path], np.where(mask, first[path], 0)
        )
    np.testing.assert_array_equal(pruned.params["head/bias"], first["head/bias"])


def test_remaining_weights_truncate_what_is_cut():
    np.testing.assert_array_equal(lottery_lib.remaining(416, 0.2, 3), [333, 267, 214])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(rounds=4, rewind_epoch=3.0), (12, [16, 32, 48, 64])),
        (dict(rounds=1, rewind_epoch=0.5), (2, [40])),
        (dict(prune_epochs=[5, 10.5], rewind_epoch=0), (0, [20, 42])),
    ],
)
def test_when_rounds_end(options, expected):
    options = dict(rounds=9, prune_epochs=None) | options
    assert lottery_lib.round_steps(80, 4, **options) == expected


@pytest.mark.parametrize(
    "options",
    [
        dict(rounds=4, rewind_epoch=4.0),
        dict(prune_epochs=[5, 5]),
        dict(prune_epochs=[20]),
        dict(rounds=100),
    ],
)
def test_rounds_that_do_not_fit_the_stage(options):
    options = dict(rounds=9, prune_epochs=None, rewind_epoch=1.0) | options
    with pytest.raises(ValueError, match="each must follow the one before"):
        lottery_lib.round_steps(80, 4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rate=0.0), r"rate must be in \(0, 1\), got 0.0"),
        (dict(rate=1.0), r"rate must be in \(0, 1\)"),
        (dict(rounds=0), "rounds must be at least 1"),
        (dict(rewind_epoch=-1.0), "rewind_epoch must be at least 0"),
        (dict(prune_epochs=()), "prune_epochs is empty"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        compression.create("lottery", **options)


def test_a_stage_that_is_too_short_is_a_mistake_in_the_plan():
    optimizer = dict(name="sgd", learning_rate=0.1)
    ticket = dict(lottery=dict(rounds=2, rewind_epoch=1.0))
    plan = Plan.from_config(
        dict(
            data=dict(source="digits", batch_size=64),
            networks=dict(n=dict(name="resnet8", width_factor=0.125, compress=ticket)),
            stages=dict(n=dict(method=dict(ce={}), optimizer=optimizer, epochs=2)),
            run=("n",),
        )
    )
    message = "config.stages.n: lottery: weights are stored at step 22 and rounds end"
    with pytest.raises(ConfigError, match=message):
        make_setup(plan)
