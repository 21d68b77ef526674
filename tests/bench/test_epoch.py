"""bench/epoch.py: three ways through an epoch, and the recipe's time."""

import json

import pytest


@pytest.fixture(scope="module")
def epoch(script):
    return script("epoch")


def test_an_epoch_is_measured_in_three_ways(epoch, tiny, capsys):
    arguments = ["--records=16", "--test-records=8", "--batch-size=8", "--rounds=1"]
    assert epoch.main([*arguments, f"--pair={tiny}-{tiny}", "--width=0.5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["benchmark"] == "epoch"
    assert list(result["images_per_second"]) == list(epoch.SIDES)
    assert result["ratios"].keys() == {"resident", "resident_epoch"}
    assert result["ratio"] == result["ratios"]["resident_epoch"] > 0
    assert result["steps_per_epoch"] == 2
    assert all(seconds > 0 for seconds in result["epoch_seconds"].values())
    assert result["data"].startswith("synthetic")
    assert result["records"] == 16


def test_what_a_device_means_for_the_defaults(epoch):
    small = epoch.parse([])
    assert (small.pair, small.precision) == ("resnet14-resnet8", "float32")
    large = epoch.parse(["--device=gpu", "--records=640"])
    assert (large.pair, large.precision) == ("resnet32x4-resnet8x4", "bfloat16")
    assert (large.width, large.records, large.test_records) == (1.0, 640, 10_000)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--records=32", "less than one batch of 64"),
        ("--test-records=1", "--test-records must be at least 2"),
        ("--epochs=241", "the recipe has 240"),
        ("--recipe=imagenet", "invalid choice"),
        ("--pair=resnet8", "TEACHER-STUDENT"),
    ],
)
def test_impossible_options_end_with_status_2(epoch, capsys, argument, message):
    arguments = [argument] if "records" in argument else ["--records=64", argument]
    assert epoch.main(arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_command_gets_the_recipe_or_a_part_of_it(epoch, tmp_path):
    from jaxkd.training.config import apply_overrides, load_config, parse_overrides

    def config(*options):
        options = epoch.parse(["--variant=full", "--recipe=cifar100-kd", *options])
        spec, _, *rest = epoch.recipe_arguments(options, tmp_path / "a.npz", tmp_path)
        file = spec.removeprefix("--config=")
        return apply_overrides(load_config(file), parse_overrides(rest))

    whole = config("--epochs=240")
    stage = whole["stages"]["student"]
    assert (stage["epochs"], whole["run"]) == (240, ("student",))
    assert stage["optimizer"]["milestones"] == (150, 180, 210)
    assert whole["train"] == {"resident": True, "steps_per_call": "epoch"}
    assert whole["evaluation"]["every_epochs"] == 10
    assert whole["checkpoint"]["every_steps"] == 10 * 781
    assert whole["data"]["batch_size"] == 64
    assert whole["networks"]["teacher"] == {"name": "resnet32x4", "frozen": True}
    part = config("--epochs=4")
    assert part["stages"]["student"]["optimizer"]["schedule"] == "constant"
    assert part["evaluation"]["every_epochs"] == 4


def test_the_missing_epochs_are_extrapolated_without_start_and_compilation(epoch):
    options = epoch.parse(["--recipe=cifar100-kd", "--epochs=10"])
    record = {"step_seconds": 0.02, "teacher_share": 0.5, "ceiling_share": 0.1}
    summary = {
        "device": "1 x cpu",
        "stages": [
            {
                "seconds": 25.0,
                "steps": 70,
                "images_per_second": 3200.0,
                "programs": {
                    "1": {"compile_seconds": 2.0},
                    "7": {"compile_seconds": 3},
                },
            }
        ],
    }
    records = [{**record, "loss": 4.0}, {**record, "loss": 3.0}]
    result = epoch.times(options, 31.0, summary, records)
    # 20 seconds for 10 epochs.
    assert result["epoch_seconds"] == 2.0
    assert result["recipe_seconds"] == 31 + 230 * 2
    assert result["recipe_is"] == "extrapolated"
    assert result["epoch_seconds_in_steps"] == 0.14
    assert result["start_and_end_seconds"] == 6.0
    assert (result["loss"], result["flops_per_second"]) == ([4.0, 3.0], None)
    whole = epoch.parse(["--recipe=cifar100-kd", "--epochs=240"])
    result = epoch.times(whole, 31.0, summary, records)
    assert (result["recipe_seconds"], result["recipe_is"]) == (31.0, "measured")


def test_a_mistake_of_the_command_is_one_of_the_script(epoch, capsys):
    arguments = ["--recipe=cifar100-kd", "--pair=resnet8-resnet8", "--width=-1"]
    arguments += ["--records=8", "--test-records=2", "--batch-size=8", "--epochs=1"]
    assert epoch.main(arguments) == 2
    assert "config.networks.student" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_recipe_is_run_by_the_command(epoch, capsys):
    arguments = ["--recipe=cifar100-kd", "--pair=resnet8-resnet8", "--width=0.25"]
    arguments += ["--records=16", "--test-records=8", "--batch-size=8", "--epochs=2"]
    assert epoch.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["recipe_is"] == "extrapolated"
    assert result["recipe_seconds"] > result["measured_seconds"] > 0
    assert result["epochs"] == 2
