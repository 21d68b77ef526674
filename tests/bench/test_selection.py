"""bench/selection.py in miniature."""

import json

import pytest


@pytest.fixture
def selection(script):
    return script("selection")


TINY = ["--epochs=1", "--seeds=2", "--rounds=1", "--steps=1", "--width=0.25"]
TINY += ["--batch-size=240"]


@pytest.mark.slow
def test_it_prints_a_line_and_writes_it(selection, tmp_path, capsys):
    out = tmp_path / "selection.json"
    names = "--trials=all;proxy, keep 0.5"
    assert selection.main([*TINY, names, f"--out={out}"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["benchmark"] == "selection"
    assert json.loads(out.read_text()) == result
    assert list(result["trials"]) == names.removeprefix("--trials=").split(";")
    costs = {name: t["training_macs"] for name, t in result["trials"].items()}
    # Half of the records, and the forward pass of a proxy of half the width.
    assert 0.5 < costs["proxy, keep 0.5"] / costs["all"] < 0.65
    assert set(result["overhead"]) == {"all", "hard batches", "ohem", "loss rank"}
    assert result["overhead"]["all"]["ratio"] == 1
    assert "| proxy, keep 0.5 |" in printed.err
    assert result["task"]["seeds"] == 2 and "versions" in result


def test_every_trial_makes_a_plan(selection, tmp_path):
    import programs
    import trials

    task = trials.task_of(selection.parse(TINY))
    for trial in selection.all_trials(task).values():
        setup = programs.set_up(trials.config(task, trial, tmp_path))
        assert setup.stages[-1].name == "student"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials=hard"], "no trial 'hard'; separate names of all; all, fixed;"),
        (["--epochs=0"], "--epochs must be at least 1, got 0"),
        (["--data=npz"], "--path goes with --data=npz"),
    ],
)
def test_mistakes_are_one_line(selection, arguments, message, capsys):
    assert selection.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
