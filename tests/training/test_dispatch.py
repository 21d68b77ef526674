"""Several steps in one program equal as many programs of one step."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.training.dispatch import Programs, describe, make_dispatch, stack_items
from jaxkd.training.feeds import Streaming


@pytest.fixture
def feed():
    return Streaming([])


@pytest.fixture
def items():
    rng = np.random.default_rng(0)
    return [{"image": rng.random((4, 3), np.float32)} for _ in range(4)]


def step(state, batch, teachers):
    value = state["value"] * 0.5 + jnp.mean(batch["image"]) + teachers["shift"]
    metrics = {"loss": value, "terms": {"a": state["count"]}}
    return {"count": state["count"] + 1, "value": value}, metrics


def start():
    return {"count": jnp.int32(0), "value": jnp.float32(1)}


TEACHERS = {"shift": np.float32(0.25)}


def test_a_call_of_four_steps_is_four_calls_of_one(feed, items):
    dispatch = jax.jit(make_dispatch(step, feed))
    together, metrics = dispatch(start(), (), stack_items(items), TEACHERS)
    state, losses = start(), []
    for item in items:
        state, each = dispatch(state, (), stack_items([item]), TEACHERS)
        losses.append(each["loss"][0])
    assert metrics["terms"]["a"].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-6)
    np.testing.assert_allclose(together["value"], state["value"], rtol=1e-6)
    assert together["count"] == state["count"] == 4


def test_one_step_is_no_loop(feed, items):
    dispatch = make_dispatch(step, feed)

    def primitives(n):
        args = (start(), (), stack_items(items[:n]), TEACHERS)
        return {e.primitive.name for e in jax.make_jaxpr(dispatch)(*args).eqns}

    assert "scan" not in primitives(1) and "scan" in primitives(2)


def test_a_single_item_is_not_copied(items):
    stacked = stack_items(items[:1])["image"]
    assert stacked.shape == (1, 4, 3) and stacked.base is not None
    assert stack_items(items)["image"].shape == (4, 4, 3)


def test_programs_are_compiled_once_for_each_number_of_steps(feed, items, caplog):
    replicated = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    programs = Programs(
        name="student",
        dispatch=make_dispatch(step, feed),
        state_shardings=replicated,
        metrics_sharding=replicated,
    )
    assert not programs.has(2) and programs.flops_per_step is None
    with caplog.at_level(logging.INFO, "jaxkd"):
        for _ in range(2):
            args = (start(), (), stack_items(items[:2]), TEACHERS)
            state, _ = programs.prepare(*args)(*args)
    assert programs.has(2) and not programs.has(1)
    assert [r.message.split(" in ")[0] for r in caplog.records] == [
        "student: compiled 2 steps"
    ]
    assert state["count"] == 2 and list(programs.reports) == [2]


def test_the_report_tells_arithmetic_and_memory(feed):
    def products(state, batch, teachers):
        value = batch["image"] @ state
        return state, {"loss": jnp.mean(value)}

    replicated = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    programs = Programs(
        name="s",
        dispatch=make_dispatch(products, feed),
        state_shardings=replicated,
        metrics_sharding=replicated,
    )
    items = {"image": np.ones((3, 4, 5), np.float32)}
    programs.prepare(jnp.ones((5, 6)), (), items, ())
    assert programs.flops_per_step == 2 * 4 * 5 * 6
    report = programs.reports[3]
    assert report.argument_bytes == 4 * (5 * 6 + 3 * 4 * 5)
    assert report.peak_bytes >= report.argument_bytes
    text = describe(report, 3)
    assert text.startswith("compiled 3 steps in ") and "2.4e-07 GFLOP per step" in text
