"""What a config may say: every impossible value ends in one line that helps."""

import copy

import pytest

from jaxkd.training import ConfigError, Plan


def _config():
    optimizer = {"name": "sgd", "learning_rate": 0.1}
    return {
        "seed": 1,
        "run": ("teacher", "student"),
        "networks": {"teacher": {"name": "resnet14"}, "student": {"name": "resnet8"}},
        "data": {"source": "digits", "batch_size": 64},
        "stages": {
            "teacher": {
                "method": {"ce": {}},
                "epochs": 1,
                "optimizer": dict(optimizer),
            },
            "student": {
                "teachers": ("teacher",),
                "method": {"ce": {"weight": 0.1}, "kd": {"temperature": 4.0}},
                "epochs": 2,
                "optimizer": dict(optimizer),
            },
        },
    }


def test_a_config_becomes_a_plan_in_the_order_of_its_stages():
    plan = Plan.from_config(_config())
    assert list(plan.stages) == ["teacher", "student"]
    assert plan.stages["student"].teachers == ("teacher",)
    assert plan.stages["student"].method["kd"] == {"temperature": 4.0}
    assert plan.networks["student"].name == "resnet8"
    assert plan.learners("student") == ("student",)


def test_options_of_networks_and_sources_are_collected():
    config = _config()
    config["networks"]["student"]["width_factor"] = 0.5
    config["data"]["image_size"] = 8
    plan = Plan.from_config(config)
    assert plan.networks["student"].options == {"width_factor": 0.5}
    assert plan.data.options == {"image_size": 8}


MISTAKES = [
    ("sed", 3, r"config\.sed: unknown key; did you mean 'seed'\?"),
    ("seed", -1, r"config: seed must be >= 0 and below 2\*\*32, got -1"),
    ("seed", 2**32, r"config: seed must be >= 0 and below 2\*\*32, got 4294967296"),
    ("seed", "one", r"config\.seed: must be an integer, got 'one'"),
    ("precision", "float16", r"config\.precision: must be one of 'float32', 'bfloat16"),
    ("run", (), r"config: run: names no stage, e\.g\."),
    ("run", ("teacher", "pupil"), r"config: run: no stage 'pupil'; known: student, te"),
    ("run", ("teacher", "teacher"), r"config: run: a stage comes twice"),
    ("run", ("student", "teacher"), r"'teacher' is not trained by an earlier stage"),
    ("data.batch_size", 0, r"config\.data: batch_size must be > 0 and finite, got 0"),
    ("data.batch_size", 8.5, r"config\.data\.batch_size: must be an integer"),
    ("data.workers", -1, r"config\.data: workers must be >= 0 and finite, got -1"),
    ("data.on_error", "ignore", r"config\.data\.on_error: must be one of 'raise', 'sk"),
    ("data.augment", {"flip": "up"}, r"config\.data\.augment\.flip: must be one of"),
    ("data.augment", {"flop": 1}, r"config\.data\.augment\.flop: .*did you mean 'fli"),
    ("data.augment", {"mixup": -1.0}, r"config\.data\.augment: mixup must be"),
    ("data.augment", {"crop_box": (1, 2)}, r"config\.data\.augment\.crop_box: must"),
    (
        "stages.student.epochs",
        0,
        r"config\.stages\.student: epochs must be > 0 and finite, got 0",
    ),
    ("stages.student.epochs", "2", r"config\.stages\.student\.epochs: must be an int"),
    ("stages.student.ema", 1.0, r"config\.stages\.student: ema must be in \[0, 1\)"),
    ("stages.student.keep", "worst", r"\.keep: must be one of 'last', 'best', got 'wo"),
    ("stages.student.accumulate", 3, r"3 does not divide config\.data\.batch_size 64"),
    ("stages.student.method", {"kd": 1.0}, r"\.method\.kd: must be a group of keys"),
    ("stages.student.optimizer.name", "sdg", r"optimizer\.name: must be one of 'sgd',"),
    ("stages.student.optimizer.lr", 0.1, r"optimizer\.lr: unknown key"),
    ("mesh", {"tensor": 2}, r"config\.mesh\.tensor: unknown key"),
    ("stages.student.learner", "pupil", r"no network 'pupil'; networks: teacher, stud"),
    ("stages.student.learner", "teacher", r"'teacher' is the learner itself"),
    ("stages.student.teachers", ("mentor",), r"no network 'mentor'; networks: teacher"),
    ("stages.teacher.teachers", ("student",), r"'student' is not trained by an earlie"),
    ("stages.student.teachers", "teacher", r"\.teachers: must be a tuple of a string"),
    ("networks.student.name", 3, r"config\.networks\.student\.name: must be a string"),
    ("networks.student", {}, r"config\.networks\.student\.name: missing"),
]


@pytest.mark.parametrize(
    ("key", "value", "message"), MISTAKES, ids=lambda v: str(v)[:40]
)
def test_a_mistake_names_the_key_the_value_and_the_remedy(key, value, message):
    config = copy.deepcopy(_config())
    node = config
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    with pytest.raises(ConfigError, match=message) as error:
        Plan.from_config(config)
    assert "\n" not in str(error.value)


def test_a_stage_whose_name_is_no_network_needs_a_learner():
    config = _config()
    config["stages"]["extra"] = config["stages"].pop("student")
    config["run"] = ("teacher", "extra")
    with pytest.raises(
        ConfigError, match=r"extra\.learner: no network 'extra' \(the stage's name; or"
    ):
        Plan.from_config(config)
    config["stages"]["extra"]["learner"] = "student"
    assert Plan.from_config(config).learners("extra") == ("student",)


def test_only_the_stages_of_the_run_and_their_networks_remain():
    config = _config()
    config["run"] = ("teacher",)
    plan = Plan.from_config(config)
    assert list(plan.stages) == ["teacher"]
    assert list(plan.networks) == ["teacher"]


def test_the_best_needs_evaluation_between_epochs():
    config = _config()
    config["stages"]["student"]["keep"] = "best"
    config["evaluation"] = {"every_epochs": None}
    with pytest.raises(ConfigError, match=r"student\.keep: 'best' needs evaluation"):
        Plan.from_config(config)


def test_targets_are_those_of_one_seed():
    config = {**_config(), "seeds": (1, 2)}
    Plan.from_config(config)
    config["stages"]["student"]["targets"] = {}
    with pytest.raises(ConfigError, match=r"seeds excludes stages\.student\.targets"):
        Plan.from_config(config)
