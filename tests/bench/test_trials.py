"""Trials: their configs, what a run tells, and the table."""

import argparse

import numpy as np
import pytest


@pytest.fixture
def trials(script):
    return script("trials")


@pytest.fixture
def mistake(script):
    """The exception that scripts raise."""
    script("trials")
    from measuring import Mistake

    return Mistake


@pytest.fixture
def task(trials):
    return trials.Task(
        data="digits",
        path=None,
        records=None,
        network="resnet8",
        width=0.25,
        epochs=1,
        batch_size=240,
        learning_rate=0.05,
        seeds=2,
    )


def options(trials, **changes):
    parser = argparse.ArgumentParser()
    trials.add_options(parser)
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in changes.items()]
    return parser.parse_args(arguments)


def test_the_command_line_makes_a_task(trials):
    task = trials.task_of(options(trials, width=0.25, epochs=2), augment=False)
    assert task.network == "resnet8" and task.epochs == 2 and not task.augment
    assert task.seeds == 3 and task.data == "digits"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "npz"}, "--path goes with --data=npz"),
        ({"path": "x.npz"}, "--path goes with --data=npz"),
        ({"seeds": 1}, "--seeds must be at least 2, got 1"),
    ],
)
def test_options_that_do_not_go_together(trials, mistake, changes, message):
    with pytest.raises(mistake, match=message):
        trials.task_of(options(trials, **changes))


def test_a_trial_changes_what_it_names_alone(trials, task, tmp_path):
    plain = trials.config(task, {}, tmp_path)
    assert plain["run"] == ("student",) and plain["seeds"] == (0, 1)
    changed = trials.config(
        task,
        {
            "network": {"width_factor": 0.5},
            "stage": {"epochs": 3},
            "networks": {"proxy": {}},
            "stages": {"proxy": {"epochs": 2}},
            "augment": False,
        },
        tmp_path,
    )
    assert changed["run"] == ("proxy", "student")
    assert changed["networks"]["student"]["width_factor"] == 0.5
    assert changed["networks"]["proxy"] == {"name": "resnet8", "width_factor": 0.25}
    assert changed["stages"]["student"]["epochs"] == 3
    assert changed["stages"]["proxy"]["epochs"] == 2
    assert changed["data"]["augment"] == {}
    assert plain["data"]["augment"] == {"pad_crop": 1}
    assert (
        changed["stages"]["student"]["optimizer"]
        == (plain["stages"]["student"]["optimizer"])
    )


def test_files_are_shortened_to_the_first_training_records(trials, task, tmp_path):
    arrays = {
        "train_images": np.zeros((10, 4, 4, 3), np.uint8),
        "train_labels": np.arange(10),
        "test_images": np.zeros((3, 4, 4, 3), np.uint8),
        "test_labels": np.arange(3),
    }
    np.savez(tmp_path / "all.npz", **arrays)
    task = task._replace(data="npz", path=str(tmp_path / "all.npz"), records=4)
    source = trials.config(task, {}, tmp_path)["data"]
    with np.load(source["path"]) as found:
        assert len(found["train_images"]) == len(found["train_labels"]) == 4
        assert len(found["test_images"]) == 3
    whole = trials.config(task._replace(records=None), {}, tmp_path)["data"]
    assert whole["path"] == str(tmp_path / "all.npz")
    assert whole["augment"]["pad_crop"] == 4


def test_a_run_tells_accuracy_over_seeds_and_costs(trials, task):
    trial = {"stage": {"select": {"name": "ohem", "keep": 0.5}}}
    results = trials.run_all(task, {"half": trial})
    result = results["half"]
    assert len(result["by_seed"]) == 2
    assert result["accuracy"] == pytest.approx(np.mean(result["by_seed"]), abs=0.01)
    assert result["deviation"] == pytest.approx(
        np.std(result["by_seed"], ddof=1), abs=0.01
    )
    assert result["macs"] > 0 and result["params"] > 0
    # Five steps of two seeds; a step is about three forward passes of a batch.
    expected = 5 * 2 * 240 * 3 * result["macs"]
    assert result["training_macs"] == pytest.approx(expected, rel=0.1)
    assert result["effective_macs"] == result["macs"]
    assert result["weight_bytes"] == 4 * result["params"]
    assert result["facts"]["records_selected"] == 0.5
    table = trials.table(results, ("records_selected", "data_used"))
    lines = table.splitlines()
    assert lines[0] == (
        "| trial | accuracy, % | MMAC | effective MMAC | training GMAC | "
        "records_selected | data_used |"
    )
    assert lines[2].startswith(f"| half | {result['accuracy']:.1f} ± ")
    assert lines[2].endswith("| 0.5 |  |")


def test_a_wrong_trial_is_a_mistake(trials, task, mistake):
    with pytest.raises(mistake, match="did you mean 'ohem'"):
        trials.run(task, {"stage": {"select": {"name": "ohm"}}})
