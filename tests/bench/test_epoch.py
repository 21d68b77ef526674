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
        ("--recipe=cifar100-kd --epochs=2", "--epochs must be at least 3, got 2"),
        ("--pair=resnet8", "TEACHER-STUDENT"),
    ],
)
def test_impossible_options_end_with_status_2(epoch, capsys, argument, message):
    arguments = [] if "records" in argument else ["--records=64"]
    assert epoch.main([*arguments, *argument.split()]) == 2
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
    part = config("--epochs=7")
    assert part["stages"]["student"]["optimizer"]["schedule"] == "constant"
    # Three evaluations at least: what they cost is told by those after the second.
    assert part["evaluation"]["every_epochs"] == 2
    assert config("--epochs=30")["evaluation"]["every_epochs"] == 10


def records_of(epochs, every, *, steps=7):
    """The lines of a run: slow steps in its first epoch, then 20 ms each."""
    shares = {"teacher_share": 0.5, "ceiling_share": 0.1}
    found = []
    for epoch in range(1, epochs + 1):
        seconds = 0.02 if epoch > 1 else 0.5
        train = {"kind": "train", "epoch": float(epoch), "step_seconds": seconds}
        found.append({**train, **shares, "loss": 5.0 - epoch / 10})
        if epoch % every == 0 or epoch == epochs:
            found.append({"kind": "eval", "epoch": epoch})
    return found


def summary_of(epochs):
    programs = {"7": {"compile_seconds": 5.0}}
    stage = {"seconds": 60.0, "steps": 7 * epochs, "images_per_second": 3200.0}
    return {"device": "1 x cpu", "stages": [{**stage, "programs": programs}]}


def test_the_missing_epochs_are_extrapolated_without_what_happens_once(epoch):
    options = epoch.parse(["--recipe=cifar100-kd", "--epochs=40"])
    # Ten epochs take 1.4 s in steps, an evaluation with its save 0.6 s. Before, the
    # first evaluation compiles and the first save starts Orbax.
    judged = [20.0, 40.0, 42.0, 44.0]
    result = epoch.times(options, 66.0, summary_of(40), records_of(40, 10), judged)
    assert result["epoch_seconds_in_steps"] == 0.14
    assert result["epoch_seconds"] == 0.2
    assert result["recipe_seconds"] == 66 + 200 * 0.2
    assert result["recipe_is"] == "extrapolated"
    assert result["start_and_end_seconds"] == 6.0
    assert result["compile_seconds"] == 5.0
    assert (result["loss"], result["flops_per_second"]) == ([4.9, 1.0], None)


def test_evaluations_that_come_more_often_count_as_often_as_in_the_recipe(epoch):
    options = epoch.parse(["--recipe=cifar100-kd", "--epochs=7"])
    # After 2, 4, 6 and 7 epochs; three epochs in steps take 0.42 s, two evaluations 1.
    judged = [20.0, 30.0, 30.78, 31.42]
    result = epoch.times(options, 40.0, summary_of(7), records_of(7, 2), judged)
    assert result["epoch_seconds"] == pytest.approx(0.14 + 0.5 / 10)


def test_a_whole_recipe_is_measured(epoch):
    options = epoch.parse(["--recipe=cifar100-kd", "--epochs=240"])
    judged = [10.0 * i for i in range(1, 25)]
    result = epoch.times(options, 250.0, summary_of(240), records_of(240, 10), judged)
    assert (result["recipe_seconds"], result["recipe_is"]) == (250.0, "measured")


def test_evaluations_are_counted_while_the_command_writes(epoch, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert epoch.evaluations(metrics) == 0
    lines = [json.dumps({"kind": kind}) for kind in ("train", "eval", "train", "eval")]
    metrics.write_text("\n".join(lines) + '\n{"kind": "ev')
    assert epoch.evaluations(metrics) == 2


def test_a_mistake_of_the_command_is_one_of_the_script(epoch, capsys):
    arguments = ["--recipe=cifar100-kd", "--pair=resnet8-resnet8", "--width=-1"]
    arguments += ["--records=8", "--test-records=2", "--batch-size=8", "--epochs=3"]
    assert epoch.main(arguments) == 2
    assert "config.networks.student" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_recipe_is_run_by_the_command(epoch, capsys):
    arguments = ["--recipe=cifar100-kd", "--pair=resnet8-resnet8", "--width=0.25"]
    arguments += ["--records=16", "--test-records=8", "--batch-size=8", "--epochs=3"]
    assert epoch.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["recipe_is"] == "extrapolated"
    assert result["recipe_seconds"] > result["measured_seconds"] > 0
    assert result["epochs"] == 3
    assert result["epoch_seconds"] >= result["epoch_seconds_in_steps"] > 0
