"""bench/overhead.py: the cost of methods beside plain KD."""

import json
import math
import types

import pytest
from jax.errors import JaxRuntimeError


@pytest.fixture(scope="module")
def overhead(script):
    return script("overhead")


@pytest.fixture
def small(tiny, tmp_path):
    out = tmp_path / "overhead.json"
    arguments = f"--pair={tiny}-{tiny} --batch-size=8 --records=64 --steps=1 --rounds=2"
    return [*arguments.split(), f"--out={out}"], out


def test_methods_are_set_against_kd_and_kept(overhead, small, capsys):
    arguments, out = small
    # A network without taps has nothing to hint at.
    assert overhead.main([*arguments, "--methods=kd,dkd,fitnet"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["benchmark"] == "method_overhead"
    assert set(result["methods"]) == {"dkd"}
    row = result["methods"]["dkd"]
    assert row["low"] <= row["high"] and row["ratio"] > 0
    # DKD's arithmetic is that of KD: its losses have no products.
    assert row["counted"] == 1.0
    assert row["milliseconds"] > 0 and row["kd_milliseconds"] > 0
    assert "has no tap 'stage2'" in result["refused"]["fitnet"]
    assert "| `dkd` |" in said.err
    assert json.loads(out.read_text()) == result

    # The second sitting measures what is missing only.
    more = [*arguments, "--methods=dkd,none,dist", "--compile-workers=2"]
    assert overhead.main(more) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["methods"]["dkd"] == row
    assert set(again["methods"]) == {"dkd", "none", "dist"}
    assert again["methods"]["none"]["counted"] < 1

    assert overhead.main([*arguments, "--batch-size=16"]) == 2
    assert "other settings" in capsys.readouterr().err.splitlines()[-1]


def test_what_fails_is_told_and_does_not_end_the_table(
    overhead, small, capsys, monkeypatch
):
    """The trainings stand for what this machine cannot fail at."""

    class Training:
        open = []

        def __init__(self, method):
            self.method = method
            self.programs = types.SimpleNamespace(flops_per_step=2.0)
            self.open.append(method)

        def side(self, *, steps):
            return overhead.measuring.Side(self.run, 8, steps)

        def run(self, calls):
            if self.method == "at":
                raise JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore lines")
            return math.nan if self.method == diverging else 1.0

        def close(self):
            self.open.remove(self.method)

    def make_training(options, method, data):
        if method == "vid":
            raise JaxRuntimeError("RESOURCE_EXHAUSTED: while compiling")
        return Training(method)

    monkeypatch.setattr(overhead, "make_training", make_training)
    arguments, out = small
    diverging = "dist"
    assert overhead.main([*arguments, "--methods=dist,at,vid,dkd"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["refused"] == {
        "dist": "dist: the loss is nan",
        "at": "RESOURCE_EXHAUSTED: out of memory",
        "vid": "RESOURCE_EXHAUSTED: while compiling",
    }
    assert set(result["methods"]) == {"dkd"}
    assert Training.open == [] and json.loads(out.read_text()) == result
    diverging = "kd"
    with pytest.raises(FloatingPointError, match="kd: the loss is nan"):
        overhead.main([*arguments, "--methods=none"])


def test_no_method_is_begun_when_the_time_is_over(overhead, small, capsys):
    arguments, _ = small
    assert overhead.main([*arguments, "--methods=dkd", "--seconds=-1"]) == 0
    assert json.loads(capsys.readouterr().out)["methods"] == {}


def test_the_table_begins_with_the_cheapest_method(overhead):
    row = {"low": 0.9, "high": 1.25, "counted": None}
    text = overhead.markdown(
        {
            "methods": {
                "crd": {**row, "ratio": 1.2, "counted": 1.0312},
                "none": {**row, "ratio": 0.5},
            }
        }
    )
    assert text.splitlines()[2:] == [
        "| `none` | 0.50 | 0.90 to 1.25 |  |",
        "| `crd` | 1.20 | 0.90 to 1.25 | 1.03 |",
    ]


def test_all_methods_are_those_with_a_recipe(overhead, capsys):
    options = overhead.parse([])
    assert len(options.methods) > 40 and "kd" not in options.methods
    assert options.pair == "resnet14-resnet8"
    assert overhead.main(["--methods=nothing"]) == 2
    assert "no method 'nothing'; known: none, kd" in capsys.readouterr().err
    assert overhead.main(["--rounds=0"]) == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err


def test_a_pair_that_kd_refuses_is_a_mistake(overhead, tiny, capsys):
    arguments = ["--records=64", "--batch-size=8", "--methods=dkd", "--pair=nothing-x"]
    assert overhead.main(arguments) == 2
    assert "no network 'nothing'" in capsys.readouterr().err.splitlines()[-1]
