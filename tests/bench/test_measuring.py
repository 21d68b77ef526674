"""What the scripts of bench/ share."""

import math
import os
import sys
import types

import pytest


@pytest.fixture(scope="module")
def measuring(script):
    return script("measuring")


class FakeClock:
    """A clock that fake sides move on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def fake_side(measuring, clock, log, name, seconds, *, images=8, calls=3, loss=1.0):
    def run(calls):
        log.append((name, calls))
        clock.now += calls * seconds
        return loss

    return measuring.Side(run, images, calls)


def test_sides_take_turns_and_only_the_asked_calls_are_timed(measuring, capsys):
    clock, log = FakeClock(), []
    sides = {
        "jax": fake_side(measuring, clock, log, "jax", 0.5),
        "torch": fake_side(measuring, clock, log, "torch", 0.5, images=16, calls=2),
    }
    rates = measuring.take_turns(sides, rounds=2, clock=clock)
    assert rates == {"jax": [16.0, 16.0], "torch": [32.0, 32.0]}
    one_round = [("jax", 1), ("jax", 3), ("torch", 1), ("torch", 2)]
    assert log == [("jax", 1), ("torch", 1), *one_round, *one_round]
    said = capsys.readouterr()
    assert said.out == ""
    assert "round 2 of 2, images/s: jax 16.0, torch 32.0" in said.err


def test_a_loss_that_is_not_finite_stops_the_measurement(measuring):
    clock, log = FakeClock(), []
    side = fake_side(measuring, clock, log, "jax", 1.0, loss=math.nan)
    with pytest.raises(FloatingPointError, match="jax: the loss is nan") as raised:
        measuring.take_turns({"jax": side}, rounds=1, clock=clock)
    assert raised.value.side == "jax"


def test_medians_spreads_and_ratios(measuring):
    assert measuring.spread([3.0, 1.0, 2.004]) == {
        "median": 2.0,
        "low": 1.0,
        "high": 3.0,
        "rounds": [3.0, 1.0, 2.0],
    }
    assert measuring.ratio_of([10.0, 30.0, 20.0], [40.0, 41.0, 900.0]) == 0.4878


def test_a_result_is_one_line_of_json_and_a_mistake_is_status_2(measuring, capsys):
    assert measuring.end(lambda arguments: {"a": [1, math.nan]}) == 0
    assert capsys.readouterr().out == '{"a": [1, null]}\n'

    def wrong(arguments):
        raise measuring.Mistake(f"no {arguments[0]}\nhere")

    assert measuring.end(wrong, ["x"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "no x here\n")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_report_tells_what_was_measured_and_where(measuring, monkeypatch, elsewhere):
    done = []
    monkeypatch.setattr(measuring, "load", lambda: 0.25)
    monkeypatch.setattr(measuring, "limit_threads", lambda n: done.append(n))
    monkeypatch.setattr(measuring, "use_device", lambda name: done.append(name))

    def work(options):
        done.append("work")
        return {"ratio": options.ratio}

    options = types.SimpleNamespace(ratio=2.0, threads=3, device="cpu")
    result = measuring.report(options, work, elsewhere=elsewhere)
    # A process that works elsewhere leaves the device alone until then.
    assert done == ([3, "work", "cpu"] if elsewhere else [3, "cpu", "work"])
    assert (result["ratio"], result["load"]) == (2.0, 0.25)
    assert result["device"] == measuring.device_name("cpu")
    assert result["versions"] == measuring.versions()


def test_options_that_argparse_refuses_are_mistakes(measuring):
    parser = measuring.Parser("step.py", "What it does.\n\nMore.")
    parser.add_argument("--steps", type=int)
    with pytest.raises(measuring.Mistake, match="invalid int value: 'many'; see"):
        parser.parse_args(["--steps=many"])
    assert "What it does." in parser.format_help()
    options = parser.parse_args(["--steps=0"])
    with pytest.raises(measuring.Mistake, match="--steps must be at least 1, got 0"):
        measuring.at_least(options, 1, "steps")
    measuring.at_least(parser.parse_args([]), 1, "steps")


def test_a_missing_package_is_named_with_its_remedy(measuring, monkeypatch):
    measuring.need("numpy", "no remedy")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(measuring.Mistake, match="torch is not installed; pip it"):
        measuring.need("torch", "pip it")


def test_more_threads_than_cores_are_refused(measuring, monkeypatch):
    cores = measuring.usable_cores()
    assert cores >= 1
    measuring.limit_threads(cores)
    with pytest.raises(measuring.Mistake, match=f"may use {cores} cores"):
        measuring.limit_threads(cores + 1)
    monkeypatch.setattr(measuring, "usable_cores", lambda: 4)
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(measuring.Mistake, match="only Linux"):
        measuring.limit_threads(2)


def test_a_device_that_jax_does_not_have_is_refused(measuring, monkeypatch):
    # Restored afterwards: the script sets it.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    measuring.use_device("cpu")
    with pytest.raises(measuring.Mistake, match="--device=gpu, but JAX computes on"):
        measuring.use_device("gpu")
    assert measuring.device_name("cpu").startswith("cpu (")


def test_a_busy_machine_is_told(measuring, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.123, 9.0, 9.0))
    assert measuring.load() == 0.12
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    assert measuring.load() == 3.0
    assert "load 3.0" in capsys.readouterr().err


def test_versions_are_those_of_what_is_installed(measuring, monkeypatch):
    import jax

    monkeypatch.setattr(measuring, "PACKAGES", ("jax", "no-such-package"))
    assert measuring.versions().keys() == {"python", "jaxkd", "jax"}
    assert measuring.versions()["jax"] == jax.__version__
