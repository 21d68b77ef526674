"""When a trace begins and ends, who writes it, and what it keeps out of step times."""

import logging

import jax
import pytest

from jaxkd.training.profiler import Profiler
from jaxkd.training.progress import Meter


class Noting(Meter):
    """A meter that notes what it is asked for."""

    def __init__(self, events):
        self._events = events

    def settle(self, running):
        self._events.append(f"settle {running}")

    def restart(self):
        self._events.append("restart")


@pytest.fixture
def events(monkeypatch):
    """Everything that happens, in order; the device's tracer is not started."""
    events = []

    def start_trace(folder, *, create_perfetto_trace):
        assert create_perfetto_trace
        events.append(f"start {folder}")

    monkeypatch.setattr(jax.profiler, "start_trace", start_trace)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    return events


@pytest.fixture
def stage(events, tmp_path):
    """Makes some calls of a stage."""

    def stage(calls, *, steps, traced, error=None):
        meter = Noting(events)
        with Profiler("student", tmp_path, steps=traced) as profiler:
            for i in range(calls):
                profiler.before(meter)
                events.append(f"call {i}")
                profiler.after(meter, steps)
            if error is not None:
                raise error

    return stage


def test_whole_calls_are_traced_after_the_first_two(stage, events, tmp_path):
    stage(6, steps=2, traced=3)
    assert events == [
        "call 0",
        "call 1",
        "settle 0",
        f"start {tmp_path}",
        "restart",
        "call 2",
        "call 3",
        "settle 0",
        "stop",
        "restart",
        "call 4",
        "call 5",
    ]


def test_nothing_is_traced_unless_asked_for(stage, events, caplog):
    stage(4, steps=1, traced=0)
    assert events == [f"call {i}" for i in range(4)] and not caplog.records


def test_process_0_alone_traces(stage, events, monkeypatch, caplog):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    stage(4, steps=1, traced=1)
    stage(1, steps=1, traced=1)
    assert events == [*(f"call {i}" for i in range(4)), "call 0"]
    assert not caplog.records


def test_a_stage_that_ends_early_ends_the_trace(stage, events, caplog):
    with caplog.at_level(logging.INFO, "jaxkd"):
        stage(4, steps=1, traced=100)
    assert events[-2:] == ["call 3", "stop"]
    assert "student: trace of some steps" in caplog.text


def test_a_stage_too_short_says_so_in_one_line(stage, events, caplog):
    stage(2, steps=5, traced=3)
    assert events == ["call 0", "call 1"]
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("student: no trace, as it begins after 2 calls and the")
    assert "made 2; lower config.train.steps_per_call" in message
    assert "\n" not in message


def test_a_stage_that_was_stopped_or_has_no_call_left_says_nothing(stage, caplog):
    with pytest.raises(KeyboardInterrupt):
        stage(1, steps=1, traced=3, error=KeyboardInterrupt())
    stage(0, steps=1, traced=3)
    assert not caplog.records
