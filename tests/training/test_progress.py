"""The meter: windows of steps, times, and values that are not finite."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.training import progress
from jaxkd.training.progress import Clock, Meter, TrainingFailed


class Writer:
    def __init__(self):
        self.records = []


def meter_of(writer, clock):
    return Meter(
        stage="student",
        write=writer.records.append,
        step=0,
        clock=clock,
        every_steps=4,
        steps_per_epoch=10,
        images_per_step=32,
    )


@pytest.fixture
def time(monkeypatch):
    """A clock that stands still until it is set."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(
        progress, "time", types.SimpleNamespace(monotonic=lambda: now.seconds)
    )
    return now


@pytest.fixture
def kit(time):
    writer, clock = Writer(), Clock()
    return writer, clock, meter_of(writer, clock)


def values(*losses, **terms):
    n = len(losses)
    return {
        "loss": jnp.asarray(losses, jnp.float32),
        "terms": {k: jnp.asarray(v, jnp.float32) for k, v in terms.items()},
        "grad_norm": jnp.ones((n, *np.shape(losses)[1:])),
        "update_norm": jnp.ones((n, *np.shape(losses)[1:])),
        "learning_rate": jnp.full((n, *np.shape(losses)[1:]), 0.1),
    }


def test_the_newest_dispatch_is_left_running(kit, time):
    writer, _, meter = kit
    time.seconds += 1
    meter.dispatched(4, values(1, 2, 3, 4, ce=[0, 0, 0, 0]), data_seconds=0)
    meter.settle(1)
    assert not writer.records
    meter.dispatched(4, values(5, 6, 7, 8, ce=[1, 1, 1, 1]), data_seconds=0)
    meter.settle(1)
    time.seconds += 1
    assert [r["step"] for r in writer.records] == [4]
    meter.drain()
    assert [(r["step"], r["loss"]) for r in writer.records] == [(4, 2.5), (8, 6.5)]
    assert writer.records[1]["terms"] == {"ce": 1.0}
    meter.drain()
    assert len(writer.records) == 2


def test_windows_do_not_depend_on_how_many_steps_go_out_at_once(kit, time):
    losses = list(range(11))
    writer, _, meter = kit
    meter.dispatched(11, values(*losses, ce=losses), data_seconds=0)
    time.seconds += 1
    meter.drain()
    together = [(r["step"], r["loss"], r["epoch"]) for r in writer.records]
    assert together == [(4, 1.5, 0.4), (8, 5.5, 0.8), (11, 9.0, 1.1)]
    writer = Writer()
    meter = meter_of(writer, Clock())
    for loss in losses:
        meter.dispatched(1, values(loss, ce=[loss]), data_seconds=0)
        time.seconds += 1
        meter.settle(1)
    meter.drain()
    assert [(r["step"], r["loss"], r["epoch"]) for r in writer.records] == together


class Watched:
    """An array on a device that tells when it is sent to the host."""

    is_fully_addressable = True

    def __init__(self, values, sent, name):
        self._values, self._sent, self._name = np.asarray(values), sent, name

    def copy_to_host_async(self):
        self._sent.append(self._name)

    def block_until_ready(self):
        return self

    def __array__(self, dtype=None, copy=None):
        return self._values


def test_metrics_come_to_the_host_when_a_window_ends(kit, time):
    writer, _, meter = kit
    sent = []
    for call, losses in enumerate(([1, 2], [3], [4, 5], [6])):
        metrics = values(*losses, ce=losses)
        metrics["loss"] = Watched(losses, sent, call)
        time.seconds += 1
        meter.dispatched(len(losses), metrics, data_seconds=0)
    # The third holds the fourth step, with which a window ends.
    assert sent == [2] and not writer.records
    meter.settle(1)
    assert sorted(sent[1:]) == [0, 1, 2] and writer.records[0]["loss"] == 2.5
    time.seconds += 1
    meter.drain()
    # The steps of the third that belong to the next window are on the host already.
    assert sorted(sent[4:]) == [3] and writer.records[1]["loss"] == 5.5


def test_times_are_those_between_the_ends_of_dispatches(kit, time):
    writer, clock, meter = kit
    meter.dispatched(4, values(1, 1, 1, 1, ce=[0] * 4), data_seconds=0.4)
    time.seconds += 2
    meter.settle(0)
    time.seconds += 50  # an evaluation
    meter.restart()
    meter.dispatched(4, values(1, 1, 1, 1, ce=[0] * 4), data_seconds=0.8)
    time.seconds += 4
    meter.drain()
    first, second = writer.records
    assert first["step_seconds"] == 0.5 and second["step_seconds"] == 1.0
    assert first["images_per_second"] == 64 and second["images_per_second"] == 32
    assert first["data_seconds"] == pytest.approx(0.1)
    assert (clock.step_seconds, clock.steps) == (6.0, 8)
    assert "flops_per_second" not in first and "teacher_share" not in first


def test_arithmetic_is_set_against_the_ceiling(kit, time):
    writer, _, meter = kit
    meter.flops_per_step, meter.ceiling = 3e9, 24e9
    meter.dispatched(4, values(1, 1, 1, 1, ce=[0] * 4), data_seconds=0)
    time.seconds += 2
    meter.drain()
    assert writer.records[0]["flops_per_second"] == pytest.approx(6e9)
    assert writer.records[0]["ceiling_share"] == pytest.approx(0.25)


def test_seeds_are_averaged_and_named_apart(kit, time):
    writer, _, meter = kit
    time.seconds += 1
    meter.dispatched(2, values([1, 3], [2, 6], ce=[[0, 1], [0, 1]]), data_seconds=0)
    meter.drain()
    assert writer.records[0]["loss"] == 3.0
    assert writer.records[0]["loss_by_seed"] == [1.5, 4.5]
    assert writer.records[0]["terms"] == {"ce": 0.5}


@pytest.mark.parametrize(
    "metrics, message",
    [
        (values(1, np.nan, ce=[1, 1], kd=[1, np.nan]), "step 2: term 'kd' is not fin"),
        (values(1, np.inf, ce=[1, 1]), "step 2: loss is not finite"),
        (values([1, 1], [1, np.nan], ce=[[1, 1]] * 2), "step 2: loss is not finite"),
    ],
)
def test_a_value_that_is_not_finite_is_named_with_its_step(kit, time, metrics, message):
    writer, _, meter = kit
    meter.dispatched(2, metrics, data_seconds=0)
    with pytest.raises(TrainingFailed, match=f"stage 'student', {message}"):
        meter.drain()
    assert not writer.records


def test_the_clock_adds_up_over_interruptions():
    clock = Clock(seconds=10.0, step_seconds=4.0, steps=8)
    clock.start()
    clock.stop()
    assert clock.seconds >= 10.0
    assert clock.images_per_second(32) == pytest.approx(8 * 32 / 4.0)
    assert np.isnan(Clock().images_per_second(32))
