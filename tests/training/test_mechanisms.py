"""Whole runs of stages that do more than teach one student."""

import copy

import jax
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
from jaxkd.training.batches import train_batches
from jaxkd.training.loop import load_variables
from jaxkd.training.signals import Stopped

OPTIMIZER = {"name": "sgd", "learning_rate": 0.05}
SMALL = {"name": "resnet8", "width_factor": 0.125}
CONFIG = {
    "run": ("teacher", "student"),
    "networks": {
        "teacher": {"name": "resnet8", "width_factor": 0.25},
        "student": dict(SMALL),
        "peer": dict(SMALL),
    },
    "data": {"source": "digits", "batch_size": 240},
    "stages": {
        "teacher": {"method": {"ce": {}}, "epochs": 1, "optimizer": OPTIMIZER},
        "student": {
            "teachers": ("teacher",),
            "method": {"ce": {}, "kd": {}},
            "epochs": 1,
            "optimizer": OPTIMIZER,
        },
    },
    "log": {"every_steps": 5},
}


def changed(**changes):
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        node = config
        *parents, last = key.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


def finish(path, config):
    setup = make_setup(Plan.from_config(config))
    workdir = Workdir(path)
    workdir.claim(setup.plan)
    with StopSignal() as stop:
        return setup, workdir, run(setup, workdir, command="test", stop=stop)


def test_banks_predictions_and_own_optimisers_resume_exactly(tmp_path, monkeypatch):
    """Stopped after a few steps of the stage and started again, the run is the same."""
    method = {
        "ce": {"weight": {"schedule": "linear", "start": 0.0, "end": 1.0, "epochs": 2}},
        "crd": {"negatives": 16, "dim": 4},
        "pskd": {"weight": 0.5},
        "meal_v2": {"discriminator_learning_rate": 0.01},
        "simkd": {},
    }
    config = changed(
        run=("student",),
        networks__teacher__frozen=True,
        stages__student__method=method,
        stages__student__epochs=2,
        stages__student__ema=0.9,
    )
    setup, workdir, _ = finish(tmp_path / "unbroken", config)
    done = ["student"]
    expected = load_variables(setup, workdir, "student", done)

    stopped = tmp_path / "stopped"
    original = runner_lib._Loop._stopping

    def stopping(self, before, step):
        if (self.stage.name, step) == ("student", 7):
            self.runner.stop.received = "SIGTERM"
        return original(self, before, step)

    monkeypatch.setattr(runner_lib._Loop, "_stopping", stopping)
    with pytest.raises(Stopped):
        finish(stopped, config)
    monkeypatch.undo()
    setup, workdir, _ = finish(stopped, config)
    got = load_variables(setup, workdir, "student", done)
    assert "readout" in got
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_students_that_learn_together_are_judged_and_handed_on_apart(
    stored_module, tmp_path
):
    network = {"name": "network_of_stored:Network"}
    config = changed(
        run=("student", "after"),
        networks={name: network for name in ("student", "peer", "teacher")},
        stages__student={
            "learner": ("student", "peer"),
            "method": {"dml": {"students": 2}},
            "epochs": 1,
            "optimizer": OPTIMIZER,
        },
        stages__after={
            "learner": "teacher",
            "teachers": ("peer",),
            "method": {"kd": {}},
            "epochs": 1,
            "optimizer": OPTIMIZER,
        },
    )
    setup, workdir, summary = finish(tmp_path, config)
    assert list(summary["results"]) == ["student", "peer", "teacher"]
    assert summary["stages"][0]["learners"] == ["student", "peer"]
    variables = {
        name: load_variables(setup, workdir, name, ["student", "after"])
        for name in ("student", "peer")
    }
    shapes = jax.eval_shape(setup.networks["student"].init, jax.random.key(0))
    for tree in variables.values():
        assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, shapes)
    kernels = [v["params"]["head"]["kernel"] for v in variables.values()]
    assert not np.allclose(*kernels)
    assert evaluate(setup, workdir)["results"] == summary["results"]


def test_a_student_that_predicts_through_its_method_is_judged_so(tmp_path):
    config = changed(stages__student__method={"simkd": {}})
    setup, workdir, summary = finish(tmp_path, config)
    variables = load_variables(setup, workdir, "student", ["teacher", "student"])
    teacher = load_variables(setup, workdir, "teacher", ["teacher", "student"])
    head = variables["readout"]["memory"]["head"]
    np.testing.assert_array_equal(head["kernel"], teacher["params"]["head"]["kernel"])
    images = np.stack([setup.test[i]["image"] for i in range(len(setup.test))])
    labels = np.array([setup.test[i]["label"] for i in range(len(setup.test))])
    outputs, _ = setup.networks["student"].apply(
        variables, jax.numpy.asarray(images), train=False, key=None
    )
    accuracy = float((np.argmax(outputs.logits, -1) == labels).mean())
    assert summary["results"]["student"]["accuracy"] == pytest.approx(accuracy)
    alone = make_setup(Plan.from_config(CONFIG)).costs["student"]
    assert summary["costs"]["student"]["params"] > alone.params


def test_a_student_starts_from_another_network_with_parts_frozen(tmp_path):
    config = changed(
        networks__student={"name": "resnet8", "width_factor": 0.25},
        stages__student__start_from="teacher",
        stages__student__freeze=("^trunk/stem", "stage1"),
        stages__student__frozen_batch_norm="eval",
    )
    setup, workdir, _ = finish(tmp_path, config)
    done = ["teacher", "student"]
    teacher, student = (load_variables(setup, workdir, n, done) for n in done)
    names = {
        "trunk/stem": (teacher["params"]["trunk"], student["params"]["trunk"], "stem"),
        "statistics": (
            teacher["batch_stats"]["trunk"],
            student["batch_stats"]["trunk"],
            "stem_norm",
        ),
    }
    for before, after, key in names.values():
        jax.tree.map(np.testing.assert_array_equal, after[key], before[key])
    stage3 = [v["params"]["trunk"]["stage3_block1"] for v in (teacher, student)]
    assert not np.allclose(*(s["conv1"]["kernel"] for s in stage3))


def test_unlabelled_records_come_beside_the_labelled_ones():
    config = changed(
        run=("teacher",),
        data__labelled_fraction=0.2,
        data__unlabelled_batch_size=96,
        data__batch_size=48,
        stages__teacher__epochs=2,
    )
    setup = make_setup(Plan.from_config(config))
    assert setup.unlabelled is not None
    assert len(setup.train) + len(setup.unlabelled) == 1438
    stage = setup.stages[0]
    # An epoch passes over the larger set.
    assert stage.steps_per_epoch == len(setup.unlabelled) // 96
    batches = train_batches(setup, stage)
    assert len(batches) == stage.total_steps
    last = batches[stage.total_steps - 1]
    assert last["image"].shape[0] == 48 and last["unlabelled_image"].shape[0] == 96
    seen = np.concatenate([batches[i]["index"] for i in range(len(setup.train) // 48)])
    assert len(set(seen.tolist())) == len(seen)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"stages__student__learner": ("student", "peer")},
            "config.stages.student.method.ce: trains one student, but "
            "config.stages.student.learner names 2; take a method whose students learn "
            "together, such as 'dml', alone",
        ),
        (
            {"stages__student__method": {"dml": {"students": 3}}},
            "config.stages.student.method.dml: needs 3 students that learn together, "
            "but config.stages.student.learner names 1",
        ),
        (
            {"stages__student__method": {"mlld": {}}},
            "config.stages.student.method.mlld: needs the view 'strong' of every "
            "image; set config.data.augment.strong",
        ),
        (
            {
                "stages__student__learner": ("student", "peer"),
                "stages__student__teachers": (),
                "stages__student__method": {"ce": {}, "dml": {}},
            },
            "config.stages.student.method.ce: trains one student, but "
            "config.stages.student.learner names 2",
        ),
        (
            {
                "stages__student__teachers": (),
                "stages__student__method": {"fkd": {}},
            },
            "config.stages.student.method.fkd: needs 'target' in every batch; set "
            "config.data.regions",
        ),
        (
            {
                "stages__student__freeze": ("^head",),
                "stages__student__frozen_batch_norm": "eval",
            },
            "config.stages.student.frozen_batch_norm: no batch norm of 'student' has "
            "frozen parameters",
        ),
        (
            {"data__augment": {"strong": {}, "mixup": 0.5}},
            "config.data.augment: strong excludes mixup and cutmix",
        ),
        (
            {"data__augment": {"strong": {"magnitude": 20.0}}},
            "config.data.augment.strong: magnitude must be in [0, 10]",
        ),
        (
            {"networks__student__input": {"mean": (0.5, 0.5), "std": (0.2, 0.2)}},
            "config.networks.student: input.mean has 2 values but images have 1 "
            "channels",
        ),
        (
            {"stages__student__freeze": ("stage9",)},
            "config.stages.student.freeze: 'stage9' matches no parameter of 'student'",
        ),
        (
            {
                "networks__student": {"name": "vgg8", "width_factor": 0.125},
                "data__image_size": 32,
                "stages__student__start_from": "teacher",
            },
            "config.stages.student.start_from: no kernel of 'teacher' has the path",
        ),
        (
            {
                "stages__student__method": {
                    "kd": {"loss": "jaxkd.losses:kd", "name": "x"}
                }
            },
            "config.stages.student.method.kd: name and loss exclude each other",
        ),
        (
            {"stages__student__method": {"mine": {"loss": "nowhere:f"}}},
            "config.stages.student.method.mine: cannot import 'nowhere'",
        ),
        (
            {"networks__student": {"name": "jaxkd.losses:kd_"}},
            "config.networks.student: 'jaxkd.losses' has no function 'kd_'",
        ),
        (
            {"networks__student": {"name": "jaxkd.data:names"}},
            "config.networks.student: 'jaxkd.data:names' has no option 'num_classes'",
        ),
        (
            {"data__labelled_fraction": 0.5, "data__unlabelled_batch_size": 2000},
            "config.data.unlabelled_batch_size: 2000 is more than the",
        ),
        (
            {"stages__student__method": {"crd": {"records": 100}}},
            "config.stages.student.method: ",
        ),
        (
            {"stages__student__method": {"hint": {"student_tap": "stage9"}}},
            "config.stages.student.method: network 'student' has no tap 'stage9'; it "
            "has stem, stage1_pre, stage1",
        ),
    ],
)
def test_a_mistake_is_one_line(changes, message):
    with pytest.raises(ConfigError) as error:
        make_setup(Plan.from_config(changed(**changes)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_options_of_a_method_may_be_schedules():
    schedule = {"schedule": "linear", "start": 4.0, "end": 1.0, "epochs": 1}
    config = changed(stages__student__method={"kd": {"temperature": schedule}})
    stage = make_setup(Plan.from_config(config)).stages[1]
    assert stage.weights() == {"kd": 1.0}


def test_a_network_sees_images_of_its_own_size_and_scale():
    config = changed(
        networks__teacher={
            "name": "resnet8",
            "width_factor": 0.25,
            "input": {"image_size": (16, 16), "mean": (0.5,), "std": (0.25,)},
        }
    )
    setup = make_setup(Plan.from_config(config))
    assert setup.networks["teacher"].spec.taps["stage1"][:2] == (16, 16)
    assert setup.networks["student"].spec.taps["stage1"][:2] == (8, 8)
    plain = make_setup(Plan.from_config(CONFIG))
    assert setup.costs["teacher"].macs > 3 * plain.costs["teacher"].macs
