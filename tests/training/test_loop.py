"""The loop in this process, on eight simulated devices and a few steps of digits."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
from jaxkd.training.evaluation import Evaluation
from jaxkd.training.loop import load_variables
from jaxkd.training.progress import TrainingFailed
from jaxkd.training.signals import Stopped

# The loop does not depend on the network; that of stored_module compiles at once.
pytestmark = pytest.mark.usefixtures("stored_module")
OPTIMIZER = {"name": "sgd", "learning_rate": 0.05}
RESNET = {"name": "resnet8", "width_factor": 0.25}
CONFIG = {
    "seed": 1,
    "run": ("teacher", "student"),
    "networks": {
        "teacher": {"name": "network_of_stored:Network", "width": 8},
        "student": {"name": "network_of_stored:Network", "width": 4},
    },
    "data": {"source": "digits", "batch_size": 240},
    "stages": {
        "teacher": {"method": {"ce": {}}, "epochs": 2, "optimizer": OPTIMIZER},
        "student": {
            "teachers": ("teacher",),
            "method": {"ce": {"weight": 0.5}, "kd": {"weight": 0.5}},
            "epochs": 1,
            "optimizer": OPTIMIZER,
        },
    },
    "log": {"every_steps": 2},
}


def _config(**changes):
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        node = config
        *parents, last = key.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


def _run(path, config):
    setup = make_setup(Plan.from_config(config))
    workdir = Workdir(path)
    workdir.claim(setup.plan)
    with StopSignal() as stop:
        return setup, workdir, run(setup, workdir, command="test", stop=stop)


def stop_after(monkeypatch, **steps):
    """Lets a SIGTERM come while a step of a stage runs, by stage."""
    original = runner_lib._Loop._stopping

    def stopping(self, before, step):
        if before < steps.get(self.stage.name, -1) <= step:
            self.runner.stop.received = "SIGTERM"
        return original(self, before, step)

    monkeypatch.setattr(runner_lib._Loop, "_stopping", stopping)


def _records(path):
    text = (path / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def plain(stored_module, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    return path, *_run(path, CONFIG)


def test_the_summary_names_stages_results_and_costs(plain):
    _, setup, _, summary = plain
    assert summary["status"] == "finished"
    assert [s["name"] for s in summary["stages"]] == ["teacher", "student"]
    assert [s["steps"] for s in summary["stages"]] == [10, 5]
    assert summary["stages"][1]["method"] == {"ce": 0.5, "kd": 0.5}
    assert list(summary["results"]) == ["teacher", "student"]
    assert summary["costs"]["student"]["params"] == sum(
        x.size
        for x in jax.tree.leaves(
            jax.eval_shape(setup.networks["student"].init, jax.random.key(0))["params"]
        )
    )
    assert summary["device"] == "8 x cpu (simulated on one host)"


def test_evaluation_counts_every_record_once_on_eight_devices(plain):
    _, setup, workdir, summary = plain
    variables = load_variables(setup, workdir, "student", ["teacher", "student"])
    test = setup.test
    images = np.stack([test[i]["image"] for i in range(len(test))])
    labels = np.array([test[i]["label"] for i in range(len(test))])
    assert len(test) % 240 and len(test) % 8
    outputs, _ = setup.networks["student"].apply(
        variables, jnp.asarray(images), train=False, key=None
    )
    right = np.argmax(outputs.logits, -1) == labels
    assert summary["results"]["student"]["accuracy"] == pytest.approx(right.mean())


def test_predictions_agree_with_the_metrics_and_the_confusion(plain):
    _, setup, workdir, summary = plain
    arrays = workdir.predictions()
    assert len(arrays["index"]) == 64 and arrays["image"].dtype == np.uint8
    confusion = arrays["confusion/student"]
    assert confusion.sum() == len(setup.test)
    assert np.trace(confusion) / confusion.sum() == pytest.approx(
        summary["results"]["student"]["accuracy"]
    )
    np.testing.assert_array_equal(
        arrays["prediction/student"], arrays["probabilities/student"].argmax(-1)
    )
    truth = [int(setup.test[int(i)]["label"]) for i in arrays["index"]]
    np.testing.assert_array_equal(arrays["truth"], truth)


def test_a_finished_stage_is_not_run_again(plain):
    path, setup, workdir, summary = plain
    before = (path / "metrics.jsonl").read_bytes()
    with StopSignal() as stop:
        again = run(setup, workdir, command="test", stop=stop)
    assert again["stages"] == json.loads(json.dumps(summary["stages"]))
    assert (path / "metrics.jsonl").read_bytes() == before


def test_evaluating_again_gives_the_same_metrics(plain):
    _, setup, workdir, summary = plain
    assert evaluate(setup, workdir)["results"] == summary["results"]


def test_networks_of_one_architecture_start_equal_and_see_the_same_batches(tmp_path):
    config = _config()
    config["run"] = ("teacher", "alone", "again")
    config["networks"] |= {n: config["networks"]["student"] for n in ("alone", "again")}
    alone = {"method": {"ce": {}}, "epochs": 1, "optimizer": OPTIMIZER}
    config["stages"] |= {"alone": alone, "again": alone}
    config["data"]["augment"] = {"pad_crop": 1}
    _, _, summary = _run(tmp_path, config)
    assert summary["results"]["alone"] == summary["results"]["again"]


def test_a_second_stage_goes_on_from_the_first(tmp_path):
    config = _config(run=("teacher", "more"))
    config["stages"]["more"] = {
        "learner": "teacher",
        "method": {"ce": {}},
        "epochs": 1,
        "optimizer": {"name": "sgd", "learning_rate": 1e-9},
    }
    setup, workdir, summary = _run(tmp_path, config)
    assert [s.phase for s in setup.stages] == [0, 1]
    first, second = (
        load_variables(setup, workdir, "teacher", finished)["params"]
        for finished in (["teacher"], ["teacher", "more"])
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first, second
    )
    assert list(summary["results"]) == ["teacher"]


def test_the_best_checkpoint_is_handed_on_when_asked(tmp_path):
    # A huge learning rate at the end spoils the last epochs, but stays finite.
    config = _config(
        run=("teacher",),
        networks__teacher=RESNET,
        stages__teacher__epochs=4,
        stages__teacher__keep="best",
        stages__teacher__optimizer={
            "name": "sgd",
            "learning_rate": 0.05,
            "schedule": "multistep",
            "milestones": (2,),
            "factor": 100.0,
            "clip_norm": 1.0,
        },
    )
    _, _, summary = _run(tmp_path, config)
    evaluations = [r for r in _records(tmp_path) if r["kind"] == "eval"]
    best = max(evaluations, key=lambda r: r["accuracy"])
    assert best["step"] < 20
    assert summary["stages"][0]["handed_on_step"] == best["step"]
    assert summary["results"]["teacher"]["accuracy"] == best["accuracy"]


def test_bfloat16_computes_but_parameters_and_losses_stay_float32(tmp_path):
    config = _config(run=("teacher",), precision="bfloat16", networks__teacher=RESNET)
    setup, workdir, summary = _run(tmp_path, config)
    variables = load_variables(setup, workdir, "teacher", ["teacher"])
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    images = jnp.zeros((2, 8, 8, 1))
    outputs, _ = setup.networks["teacher"].apply(
        variables, images, train=False, key=None
    )
    assert outputs.taps["stage1"].dtype == jnp.bfloat16
    assert outputs.logits.dtype == jnp.float32
    losses = [r["loss"] for r in _records(tmp_path) if r["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_a_signal_saves_after_the_step_and_the_run_goes_on_from_there(
    tmp_path, monkeypatch, plain
):
    config = _config(run=("teacher",))
    setup = make_setup(Plan.from_config(config))
    workdir = Workdir(tmp_path)
    workdir.claim(setup.plan)
    with StopSignal() as stop:
        stop_after(monkeypatch, teacher=3)
        with pytest.raises(Stopped, match="SIGTERM in stage 'teacher' after step 3 of"):
            run(setup, workdir, command="test", stop=stop)
        monkeypatch.undo()
        stop.received = None
        summary = run(setup, workdir, command="test", stop=stop)
    assert summary["results"]["teacher"] == plain[3]["results"]["teacher"]


def test_a_run_that_diverges_stops_before_it_saves(tmp_path):
    config = _config(run=("teacher",))
    config["stages"]["teacher"]["optimizer"] = {"name": "sgd", "learning_rate": 1e30}
    with pytest.raises(TrainingFailed, match=r"'teacher', step 1: update_norm is not"):
        _run(tmp_path, config)
    assert not list((tmp_path / "checkpoints" / "teacher").glob("[0-9]*"))


def test_records_tell_rates_shares_and_terms(plain):
    path, setup, _, _ = plain
    train = [r for r in _records(path) if r["kind"] == "train"]
    assert [r["step"] for r in train if r["stage"] == "student"] == [2, 4, 5]
    last = train[-1]
    assert set(last["terms"]) == {"ce", "kd"}
    assert last["images_per_second"] > 0 and last["data_seconds"] >= 0
    assert 0 < last["teacher_share"] < 1
    assert last["flops_per_second"] > 0 and last["ceiling_share"] > 0


def test_a_run_does_not_go_on_with_other_data(tmp_path, monkeypatch):
    config = _config(run=("teacher",), stages__teacher__epochs=1)
    setup, workdir, _ = _run(tmp_path, config)
    (tmp_path / "summary.json").unlink()
    more = dataclasses.replace(setup, train=_More(setup.train))
    with (
        StopSignal() as stop,
        pytest.raises(ConfigError, match="began with 1438 training records and there"),
    ):
        run(more, workdir, command="test", stop=stop)


class _More:
    """A source with one record more."""

    def __init__(self, source):
        self._source, self.info = source, source.info
        self.groups = [*source.groups, "more"]

    def __len__(self):
        return len(self._source) + 1

    def __getitem__(self, index):
        return self._source[min(index, len(self._source) - 1)]


def test_predictions_that_are_not_finite_are_named(plain):
    _, setup, workdir, _ = plain
    variables = load_variables(setup, workdir, "student", ["teacher", "student"])
    broken = jax.tree.map(lambda x: x * jnp.nan, variables)
    with pytest.raises(TrainingFailed, match="'student' for test record 0 are not fin"):
        Evaluation(setup).judge(setup.networks["student"], broken)


@pytest.mark.slow
def test_hlfd_with_every_kind_of_state_resumes_exactly(tmp_path, monkeypatch):
    """Random and learned projections, accumulation, an average and the best step."""
    optimizer = {"name": "adam", "learning_rate": 1e-3, "clip_norm": 1.0}
    task = {"focal_dice": {}}
    config = {
        "run": ("teacher", "student"),
        "networks": {
            "teacher": {"name": "unetpp", "width_factor": 1 / 32},
            "student": {"name": "resnet18_seg", "width_factor": 1 / 32},
        },
        "data": {
            "source": "liver_ct_sample",
            "batch_size": 32,
            "image_size": 32,
            "augment": {"flip": "both", "rotate": 10.0},
        },
        "stages": {
            "teacher": {"method": task, "epochs": 1, "optimizer": optimizer},
            "student": {
                "teachers": ("teacher",),
                "method": {
                    **task,
                    "hlfd": {},
                    "learned": {"name": "hlfd", "projection": "learned"},
                    "fixed": {"name": "hlfd", "projection": "fixed"},
                },
                "epochs": 2,
                "optimizer": optimizer,
                "accumulate": 2,
                "ema": 0.9,
                "keep": "best",
            },
        },
    }
    setup, unbroken, expected = _run(tmp_path / "unbroken", config)
    workdir = Workdir(tmp_path / "broken")
    workdir.claim(setup.plan)
    with StopSignal() as stop:
        stop_after(monkeypatch, student=4)
        with pytest.raises(Stopped, match="in stage 'student' after step 4 of 10"):
            run(setup, workdir, command="test", stop=stop)
        monkeypatch.undo()
        stop.received = None
        summary = run(setup, workdir, command="test", stop=stop)
    assert summary["results"] == expected["results"]
    a, b = (
        jax.device_get(load_variables(setup, w, "student", ["teacher", "student"]))
        for w in (unbroken, workdir)
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
