"""Several steps, all records or several seeds together give what one by one gives."""

import json
import sys

import jax
import numpy as np
import pytest

from jaxkd.report import results_table
from jaxkd.training import (
    ConfigError,
    Plan,
    StopSignal,
    Workdir,
    evaluate,
    make_setup,
    run,
)
from jaxkd.training import runner as runner_lib
from jaxkd.training.loop import load_variables
from jaxkd.training.signals import Stopped

NETWORK = '''
"""A network that compiles at once."""

import flax.linen as nn
import jax.numpy as jnp
from jaxkd.layers import BatchNorm, Outputs


class Perceptron(nn.Module):
    num_classes: int
    width: int = 8

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(images.shape[0], -1)
        hidden = nn.relu(BatchNorm(name="norm")(nn.Dense(self.width)(x), train))
        logits = nn.Dense(self.num_classes)(hidden)
        return Outputs(logits=logits, taps={"hidden": hidden})
'''


@pytest.fixture(scope="module", autouse=True)
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "perceptron_of_tests.py").write_text(NETWORK)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def config(**changes):
    optimizer = {"name": "sgd", "learning_rate": 0.05}
    name = "perceptron_of_tests:Perceptron"
    return {
        "seed": 1,
        "run": ("teacher", "student"),
        "networks": {
            "teacher": {"name": name, "width": 12},
            "student": {"name": name, "width": 4},
        },
        "data": {
            "source": "digits",
            "batch_size": 240,
            "augment": {"pad_crop": 1, "flip": "horizontal"},
        },
        "stages": {
            "teacher": {"method": {"ce": {}}, "epochs": 2, "optimizer": optimizer},
            "student": {
                "teachers": ("teacher",),
                "method": {"ce": {"weight": 0.5}, "kd": {"weight": 0.5}},
                "epochs": 3,
                "optimizer": optimizer,
                "ema": 0.5,
            },
        },
        "log": {"every_steps": 2},
        **changes,
    }


def finish(path, changed):
    setup = make_setup(Plan.from_config(changed))
    workdir = Workdir(path)
    workdir.claim(setup.plan)
    with StopSignal() as stop:
        summary = run(setup, workdir, command="test", stop=stop)
    return setup, workdir, summary


def records(workdir):
    text = (workdir.path / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def student(setup, workdir):
    return load_variables(setup, workdir, "student", ["teacher", "student"])


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "one"
    return finish(path, config(train={"resident": False}))


@pytest.mark.parametrize(
    "train",
    [
        {"resident": True},
        {"resident": False, "steps_per_call": 3},
        {"resident": True, "steps_per_call": "epoch"},
    ],
)
def test_how_steps_are_sent_changes_no_number(one_by_one, tmp_path, train):
    setup, workdir, summary = finish(tmp_path, config(train=train))
    expected_setup, expected_workdir, expected = one_by_one
    assert setup.resident is train["resident"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        student(setup, workdir),
        student(expected_setup, expected_workdir),
    )
    assert summary["results"]["student"] == pytest.approx(
        expected["results"]["student"], rel=1e-4
    )
    got, known = (
        [(r["kind"], r["stage"], r["step"]) for r in records(w)]
        for w in (workdir, expected_workdir)
    )
    assert got == known
    # Five steps of an epoch: a call of three is followed by one of two.
    programs = set(summary["stages"][1]["programs"])
    calls = {1: {"1"}, 3: {"3", "2"}, "epoch": {"5"}}
    assert programs == calls[train.get("steps_per_call", 1)]


def test_a_run_goes_on_with_other_ways_of_sending(one_by_one, tmp_path, monkeypatch):
    """Stopped within an epoch of streamed steps, continued resident and in epochs."""
    original = runner_lib._Loop._stopping

    def stopping(self, before, step):
        if (self.stage.name, step) == ("student", 7):
            self.runner.stop.received = "SIGTERM"
        return original(self, before, step)

    monkeypatch.setattr(runner_lib._Loop, "_stopping", stopping)
    with pytest.raises(Stopped, match="after step 7 of 15"):
        finish(tmp_path, config(train={"resident": False}))
    monkeypatch.undo()
    changed = config(train={"resident": True, "steps_per_call": "epoch"})
    setup, workdir, summary = finish(tmp_path, changed)
    # From step 7 to the end of its epoch, and one epoch more.
    assert set(summary["stages"][1]["programs"]) == {"3", "5"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        student(setup, workdir),
        student(*one_by_one[:2]),
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "together"
    return finish(path, config(seeds=(1, 5)))


def test_seeds_trained_together_are_those_trained_apart(one_by_one, together, tmp_path):
    setup, workdir, summary = together
    other = finish(tmp_path, config(seed=5))
    both = setup.seeds.each(student(setup, workdir))
    for i, apart in enumerate((one_by_one, other)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            both[i],
            student(*apart[:2]),
        )
        assert summary["by_seed"]["student"][i] == pytest.approx(
            apart[2]["results"]["student"], rel=1e-3
        )
    accuracies = [r["accuracy"] for r in summary["by_seed"]["student"]]
    assert accuracies[0] != accuracies[1]
    assert summary["results"]["student"]["accuracy"] == pytest.approx(
        np.mean(accuracies)
    )
    assert summary["spread"]["student"]["accuracy"] == pytest.approx(
        np.std(accuracies, ddof=1)
    )


def test_records_and_table_of_several_seeds_tell_the_spread(together):
    _, workdir, summary = together
    train = [r for r in records(workdir) if r["kind"] == "train"]
    assert all(len(r["loss_by_seed"]) == 2 for r in train)
    assert train[0]["loss"] == pytest.approx(np.mean(train[0]["loss_by_seed"]))
    judged = [r for r in records(workdir) if r["kind"] == "eval"]
    assert all(len(r["accuracy_by_seed"]) == 2 for r in judged)
    table = results_table(summary)
    assert "±" in table and "over 2 runs, seeds 1, 5" in table


def test_several_seeds_are_evaluated_again(together):
    setup, workdir, summary = together
    assert evaluate(setup, workdir)["by_seed"] == summary["by_seed"]


def test_a_trace_of_some_steps_is_written(tmp_path):
    changed = config(profile=2, run=("teacher",))
    finish(tmp_path, changed)
    found = list((tmp_path / "profile" / "teacher").rglob("*.xplane.pb"))
    assert len(found) == 1 and found[0].stat().st_size > 1000


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": (3,)}, "seeds must be two or more and differ"),
        ({"seeds": (3, 3)}, "seeds must be two or more and differ"),
        ({"seeds": (3, -1)}, "seed must be >= 0"),
        ({"train": {"steps_per_call": 0}}, "steps_per_call must be > 0"),
        ({"train": {"steps_per_call": "all"}}, "config.train.steps_per_call: must be"),
        ({"train": {"resident": "yes"}}, "config.train.resident: must be"),
        ({"profile": -1}, "profile must be >= 0"),
    ],
)
def test_a_mistake_is_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_setup(Plan.from_config(config(**changes)))
    assert "\n" not in str(caught.value)
