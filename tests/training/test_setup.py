"""From plans to objects: what the pieces must agree on."""

import copy
import sys

import jax.numpy as jnp
import pytest

from jaxkd.training import ConfigError, Plan, make_setup

OPTIMIZER = {"name": "sgd", "learning_rate": 0.05}
CONFIG = {
    "run": ("teacher", "student"),
    "networks": {
        "teacher": {"name": "unetpp", "width_factor": 0.0625},
        "student": {"name": "resnet18_seg", "width_factor": 0.0625},
    },
    "data": {"source": "liver_ct_sample", "batch_size": 8, "image_size": 32},
    "stages": {
        "teacher": {"method": {"focal_dice": {}}, "epochs": 1, "optimizer": OPTIMIZER},
        "student": {
            "teachers": ("teacher",),
            "method": {
                "focal_dice": {},
                "hlfd": {
                    "weight": {
                        "schedule": "linear",
                        "start": 0.0,
                        "end": 1.0,
                        "epochs": 1,
                    }
                },
            },
            "epochs": 2,
            "optimizer": OPTIMIZER,
        },
    },
}


@pytest.fixture(scope="module")
def setup():
    return make_setup(Plan.from_config(CONFIG))


def test_stages_hold_networks_methods_and_lengths(setup):
    teacher, student = setup.stages
    assert teacher.teachers == () and student.teachers[0].name == "teacher"
    assert student.steps_per_epoch == len(setup.train) // 8
    assert student.total_steps == 2 * student.steps_per_epoch
    assert (setup.task, setup.metric, setup.eval_batch_size) == (
        "segmentation",
        "dice",
        8,
    )
    assert setup.costs["teacher"].macs > setup.costs["student"].macs


def test_scheduled_weights_are_marked_and_multiply_the_methods_own(setup):
    student = setup.stages[1]
    assert student.weights() == {
        "focal_dice/focal": 0.5,
        "focal_dice/dice": 0.5,
        "hlfd/flfd": "schedule",
        "hlfd/plfd": "schedule",
    }
    half = jnp.asarray(student.steps_per_epoch // 2)
    assert float(student.method.weights["hlfd/flfd"](half)) == pytest.approx(0.45)


def test_evaluation_batches_are_rounded_up_to_the_devices():
    config = copy.deepcopy(CONFIG)
    config["evaluation"] = {"batch_size": 5}
    assert make_setup(Plan.from_config(config)).eval_batch_size == 8


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (
            ("data", "image_size"),
            40,
            r"config\.networks\.teacher: .*40",
        ),
        (
            ("networks", "student", "name"),
            "resnet8",
            r"student\.name: a classification network, but the data are for segment",
        ),
        (
            ("networks", "student", "dtype"),
            "float16",
            r"config\.networks\.student: dtype is config\.precision's matter",
        ),
        (
            ("data", "colour"),
            True,
            r"config\.data: data source 'liver_ct_sample' has no option 'colour'",
        ),
        (
            ("stages", "student", "method", "hlfd", "student_e1"),
            "e9",
            r"config\.stages\.student\.method\.hlfd: .*no option 'student_e1'",
        ),
        (
            ("stages", "student", "method", "kd"),
            {"temperature": -1.0},
            r"config\.stages\.student\.method\.kd: temperature must be > 0",
        ),
        (
            ("stages", "teacher", "method", "bce"),
            {},
            r"config\.stages\.teacher\.method\.bce: no method 'bce'; did you mean",
        ),
        (
            ("evaluation",),
            {"metric": "hd95"},
            r"config\.evaluation\.metric: no metric 'hd95'.*dice, iou",
        ),
        (
            ("data", "augment"),
            {"mixup": 0.2},
            r"config\.data\.augment: (mixup|cutmix) needs one label per image",
        ),
    ],
)
def test_what_does_not_fit_together_is_one_line(keys, value, message):
    config = copy.deepcopy(CONFIG)
    node = config
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    with pytest.raises(ConfigError, match=message) as error:
        make_setup(Plan.from_config(config))
    assert "\n" not in str(error.value)


def test_a_teacher_that_no_loss_reads_is_refused():
    config = copy.deepcopy(CONFIG)
    del config["stages"]["student"]["method"]["hlfd"]
    with pytest.raises(ConfigError, match=r"\['teacher'\] given, but the method reads"):
        make_setup(Plan.from_config(config))


def test_a_missing_extra_is_found_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    config = {**CONFIG, "log": {"tensorboard": True}}
    with pytest.raises(ConfigError, match=r"config\.log\.tensorboard: needs tensorbo"):
        make_setup(Plan.from_config(config))
