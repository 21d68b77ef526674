"""What a stage does around its steps: judging once, reading late, closing always."""

import numpy as np
import pytest

from jaxkd.training import Plan, StopSignal, Workdir, make_setup, run
from jaxkd.training import runner as runner_lib
from jaxkd.training.evaluation import Evaluation, Judged
from jaxkd.training.runner import tell
from jaxkd.training.signals import Stopped

OPTIMIZER = {"learning_rate": 0.05}


@pytest.fixture
def config(stored_config):
    """Two stages of six steps each; the second goes on with the network."""
    config = stored_config(evaluation={"every_epochs": 1}, log={"every_steps": 2})
    stage = {"method": {"ce": {}}, "epochs": 2, "optimizer": OPTIMIZER}
    config["stages"] = {"student": stage, "more": {**stage, "learner": "student"}}
    config["run"] = ("student", "more")
    return config


@pytest.fixture
def start(tmp_path):
    """Runs a config in this test's folder, from where it stands."""

    def start(config):
        setup = make_setup(Plan.from_config(config))
        workdir = Workdir(tmp_path)
        workdir.claim(setup.plan)
        with StopSignal() as stop:
            return run(setup, workdir, command="test", stop=stop)

    return start


@pytest.fixture
def passes(monkeypatch):
    """Counts how often the test split goes through a network."""
    seen = []
    original = Evaluation._predict

    def predict(self, network, variables):
        seen.append(network.name)
        return original(self, network, variables)

    monkeypatch.setattr(Evaluation, "_predict", predict)
    return seen


def test_the_last_steps_networks_are_judged_once(config, start, passes, tmp_path):
    config["run"] = ("student",)
    summary = start(config)
    # Once after each of two epochs, and not again for the summary.
    assert passes == ["student", "student"]
    assert summary["results"]["student"].keys() >= {"accuracy", "macro_f1", "ece"}
    arrays = Workdir(tmp_path).predictions()
    hits = arrays["prediction/student"] == arrays["truth"]
    # All 16 test records are shown.
    assert hits.mean() == summary["results"]["student"]["accuracy"]


def test_the_best_steps_networks_are_judged_again(config, start, passes):
    config["run"] = ("student",)
    config["stages"]["student"]["keep"] = "best"
    summary = start(config)
    assert passes == ["student"] * 3 and summary["status"] == "finished"


def test_a_finished_stage_without_its_record_is_judged(config, start, passes, tmp_path):
    config["run"] = ("student",)
    first = start(config)
    passes.clear()
    (tmp_path / "summary.json").unlink()
    again = start(config)
    assert passes == ["student"] and again["results"] == first["results"]


class Said(Judged):
    """What a network of some seed says."""

    def __init__(self, seed):
        self.seed = seed

    def metrics(self, *, surface=True):
        return {"accuracy": float(self.seed)}

    def predictions(self):
        return {"prediction/student": np.full(2, self.seed)}


def test_each_seed_is_told_and_the_first_is_shown(tmp_path):
    workdir = Workdir(tmp_path)
    results = tell((Said(seed) for seed in (3, 5)), workdir)
    assert results == [{"accuracy": 3.0}, {"accuracy": 5.0}]
    assert workdir.predictions()["prediction/student"].tolist() == [3, 3]


def test_what_a_stage_starts_from_is_not_read_when_it_resumes(
    config, start, monkeypatch
):
    begun = []
    original = runner_lib.Assembly.begin

    def begin(self, known):
        begun.append(self.stage.name)
        return original(self, known)

    def stopping(self, before, step):
        if (self.stage.name, step) == ("more", 3):
            self.runner.stop.received = "SIGTERM"
        return self.runner.stop.received is not None

    monkeypatch.setattr(runner_lib.Assembly, "begin", begin)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="'more' after"):
        patch.setattr(runner_lib._Loop, "_stopping", stopping)
        start(config)
    assert begun == ["student", "more"]

    from jaxkd.training import loop

    def load(*args):
        raise AssertionError(f"{args} was read")

    monkeypatch.setattr(loop, "load_variables", load)
    summary = start(config)
    assert begun == ["student", "more"] and summary["status"] == "finished"


@pytest.mark.parametrize("failing", ["init", "restore", "close"])
def test_what_reads_is_closed_whatever_fails(config, start, monkeypatch, failing):
    config["run"] = ("student",)
    if failing == "restore":
        # Something to restore, before the stage is done.
        def stopped(self, before, step):
            self.runner.stop.received = "SIGTERM"
            return True

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(runner_lib._Loop, "_stopping", stopped)
            start(config)
    closed = []
    original = runner_lib.Assembly.close

    def close(self):
        closed.append(self.stage.name)
        original(self)

    class Failing(runner_lib.Checkpoints):
        def _fail(self, *args, **kwargs):
            raise OSError("disk gone")

        if failing == "init":
            __init__ = _fail
        elif failing == "restore":
            restore = _fail

        def close(self):
            super().close()
            if failing == "close":
                self._fail()

    monkeypatch.setattr(runner_lib.Assembly, "close", close)
    monkeypatch.setattr(runner_lib, "Checkpoints", Failing)
    with pytest.raises(OSError, match="disk gone"):
        start(config)
    assert closed == ["student"]
