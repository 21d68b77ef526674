"""The sections of a plan check themselves, each by itself."""

import math
import types

import pytest

from jaxkd.training.schema import ConfigError, build
from jaxkd.training.sections import (
    CheckpointPlan,
    EvaluationPlan,
    LogPlan,
    MeshPlan,
    OptimizerPlan,
    StagePlan,
    TargetsPlan,
    TrainPlan,
    fraction,
    not_negative,
    positive,
)


@pytest.mark.parametrize(
    ("check", "good", "bad", "message"),
    [
        (positive, (1, 0.5, None), (0, -1, math.inf, math.nan), "must be > 0 and fin"),
        (not_negative, (0, 2.5, None), (-1, math.inf, math.nan), "must be >= 0 and"),
        (fraction, (0, 0.999, None), (1, -0.1, math.nan), r"must be in \[0, 1\)"),
    ],
)
def test_a_check_names_the_field_and_its_value(check, good, bad, message):
    for value in good:
        check(types.SimpleNamespace(first=1 if check is positive else 0, value=value),
              "first", "value")  # fmt: skip
    for value in bad:
        with pytest.raises(ValueError, match=f"value {message}.*got {value}"):
            check(types.SimpleNamespace(value=value), "value")


OPTIMIZER = {"learning_rate": 0.1}
STAGE = {"method": {"ce": {}}, "epochs": 1, "optimizer": OPTIMIZER}
MISTAKES = [
    (OptimizerPlan, {}, r"learning_rate: missing"),
    (OptimizerPlan, {"learning_rate": 0}, r"learning_rate must be > 0 and finite"),
    (OptimizerPlan, {"learning_rate": math.inf}, r"> 0 and finite, got inf"),
    (OptimizerPlan, OPTIMIZER | {"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
    (OptimizerPlan, OPTIMIZER | {"weight_decay": -1.0}, r"weight_decay must be >= 0"),
    (OptimizerPlan, OPTIMIZER | {"clip_norm": 0.0}, r"clip_norm must be > 0 and"),
    (OptimizerPlan, OPTIMIZER | {"milestones": (1,)}, r"are for schedule 'multistep'"),
    (
        OptimizerPlan,
        OPTIMIZER | {"schedule": "multistep"},
        r"'multistep' needs milestones",
    ),
    (
        OptimizerPlan,
        OPTIMIZER | {"schedule": "multistep", "milestones": (3, 1)},
        r"milestones must increase, got \(3, 1\)",
    ),
    (
        OptimizerPlan,
        OPTIMIZER | {"end_learning_rate": 1.0},
        r"is above learning_rate 0\.1",
    ),
    (StagePlan, STAGE | {"method": {}}, r"method names no loss"),
    (StagePlan, STAGE | {"learner": ()}, r"learner must name different networks"),
    (StagePlan, STAGE | {"learner": ("a", "a")}, r"must name different networks"),
    (StagePlan, STAGE | {"freeze": ("(",)}, r"'\(' is no regular expression"),
    (TargetsPlan, {"views": 0}, r"views must be > 0"),
    (TargetsPlan, {"seed": -1}, r"seed must be >= 0"),
    (TargetsPlan, {"format": "zip"}, r"format: must be one of 'full', 'uint8', 'topk'"),
    (TargetsPlan, {"format": "topk"}, r"top_k goes with format 'topk'"),
    (TargetsPlan, {"top_k": 5}, r"top_k goes with format 'topk'.*'full'"),
    (TargetsPlan, {"format": "uint8", "dtype": "float16"}, r"dtype is for the formats"),
    (TargetsPlan, {"taps": ("a", "a")}, r"taps names one twice"),
    (TargetsPlan, {"regions": 4, "views": 2}, r"regions have a label_format"),
    (TargetsPlan, {"regions": 4, "taps": ("a",)}, r"regions have a label_format"),
    (TargetsPlan, {"shard_mebibytes": 0}, r"shard_mebibytes must be > 0"),
    (TargetsPlan, {"colour": 1}, r"colour: unknown key"),
    (EvaluationPlan, {"threshold": 1.0}, r"threshold must be in \(0, 1\), got 1"),
    (EvaluationPlan, {"every_epochs": 0}, r"every_epochs must be > 0"),
    (CheckpointPlan, {"keep": 0}, r"keep must be > 0 and finite"),
    (LogPlan, {"every_steps": 0}, r"every_steps must be > 0 and"),
    (LogPlan, {"tensorboard": 1}, r"tensorboard: must be bool, got 1"),
    (MeshPlan, {"fsdp": 0}, r"fsdp must be > 0 and finite"),
    (MeshPlan, {"data": 0}, r"data must be > 0, or -1"),
    (MeshPlan, {"model": 0}, r"model must be > 0 and finite"),
    (MeshPlan, {"teacher": "split"}, r"teacher: must be one of 'auto'"),
    (TrainPlan, {"steps_per_call": 0}, r"steps_per_call must be > 0"),
    (TrainPlan, {"remat": "all"}, r"remat: must be one of 'none', 'dots', 'blocks'"),
]


@pytest.mark.parametrize(("cls", "config", "message"), MISTAKES, ids=str)
def test_a_mistake_names_the_key_and_the_value(cls, config, message):
    with pytest.raises(ConfigError, match=f"^config.section.*{message}") as error:
        build(cls, config, "config.section")
    assert "\n" not in str(error.value)


def test_groups_inside_a_section_become_its_classes():
    config = STAGE | {"targets": {"views": 2}}
    plan = build(StagePlan, config, "config.stages.student")
    assert plan.optimizer == OptimizerPlan(learning_rate=0.1)
    assert plan.targets == TargetsPlan(views=2)


def test_a_call_has_the_steps_asked_for_or_those_of_an_epoch():
    assert TrainPlan().steps(7) == 1
    assert TrainPlan(steps_per_call=3).steps(7) == 3
    assert TrainPlan(steps_per_call="epoch").steps(7) == 7
