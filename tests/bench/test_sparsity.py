"""bench/sparsity.py in miniature."""

import json

import pytest

TINY = ["--epochs=1", "--seeds=2", "--rounds=1", "--steps=1", "--width=0.5"]
TINY += ["--batch-size=240", "--every=2", "--network=resnet8"]


@pytest.fixture
def sparsity(script):
    return script("sparsity")


@pytest.mark.slow
def test_it_prints_a_line_and_writes_it(sparsity, tmp_path, capsys):
    out = tmp_path / "sparsity.json"
    names = "--trials=dense;static, 0.9"
    assert sparsity.main([*TINY, names, f"--out={out}"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["benchmark"] == "sparsity"
    assert json.loads(out.read_text()) == result
    dense, static = (result["trials"][n] for n in ("dense", "static, 0.9"))
    # The same work as it runs, a fraction of it if zeros cost nothing.
    assert static["macs"] == dense["macs"] == dense["effective_macs"]
    assert static["effective_macs"] < 0.3 * dense["macs"]
    assert static["weight_bytes"] < 0.3 * dense["weight_bytes"]
    assert set(result["overhead"]) == {"dense", "static", "rigl"}
    assert "| static, 0.9 |" in printed.err


def test_every_trial_makes_a_plan(sparsity, tmp_path):
    import programs
    import trials

    options = sparsity.parse(TINY)
    task = trials.task_of(options)
    for name, trial in sparsity.all_trials(options).items():
        setup = programs.set_up(trials.config(task, trial, tmp_path))
        assert (setup.networks["student"].upkeep is None) == name.startswith("dense")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials=hard"], "no trial 'hard'; separate names of dense;"),
        (["--sparsity=1"], "--sparsity must be above 0 and below 1, got 1.0"),
        (["--every=0"], "--every must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(sparsity, arguments, message, capsys):
    assert sparsity.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
