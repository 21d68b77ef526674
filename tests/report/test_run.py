"""A workdir is read as far as it goes; what is broken is named in one line."""

import json
import math

import numpy as np
import pytest

from jaxkd.report.run import ReportError, number, read_run


def test_a_finished_run_is_read_whole(segmentation_run):
    run = read_run(segmentation_run("liver"))
    assert run.name == "liver" and run.status == "finished"
    assert run.task == "segmentation"
    assert run.networks == run.stages == ("teacher", "student_alone", "student")
    assert len(run.train) == 24 and len(run.evaluations) == 12
    assert run.notes == ("Synthetic numbers.",)


def test_a_run_without_summary_is_read_from_its_records(segmentation_run):
    workdir = segmentation_run()
    (workdir / "summary.json").unlink()
    (workdir / "predictions.npz").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    (workdir / "metrics.jsonl").write_text("\n".join(lines[:12]))
    run = read_run(workdir)
    assert run.status == "unfinished" and run.task == ""
    assert run.networks == ("teacher",)
    assert run.stages == ("teacher", "student_alone", "student")
    assert any("summary.json is missing" in note for note in run.notes)
    assert any("no predictions.npz" in note for note in run.notes)


def test_an_unfinished_run_is_noted(segmentation_run):
    workdir = segmentation_run(status="running")
    content = json.loads((workdir / "summary.json").read_text())
    content["stages"] = content["stages"][:1]
    (workdir / "summary.json").write_text(json.dumps(content))
    run = read_run(workdir)
    assert any("has not finished; stages done: 1" in note for note in run.notes)


def test_the_task_shows_in_the_predictions_when_nothing_else_tells(classification_run):
    workdir = classification_run()
    (workdir / "summary.json").unlink()
    assert read_run(workdir).task == "classification"


def test_a_repeated_step_counts_once_and_the_later_one_wins(segmentation_run):
    workdir = segmentation_run()
    with open(workdir / "metrics.jsonl", "a") as file:
        record = {"kind": "train", "stage": "teacher", "step": 10, "loss": 7.0}
        file.write(json.dumps(record) + "\n")
    run = read_run(workdir)
    assert len(run.train) == 24
    assert run.train[0]["loss"] == 7.0


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "train", "sta',
        "[1, 2]",
        '{"kind": "train"}',
        '{"kind": "train", "stage": "a", "step": null}',
        '{"kind": "train", "stage": "a", "step": 1, "terms": [1]}',
    ],
)
def test_lines_that_are_no_records_are_left_out_and_counted(segmentation_run, line):
    workdir = segmentation_run()
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write(line + "\n\n")
    run = read_run(workdir)
    assert len(run.train) == 24
    assert any(note.startswith("1 unreadable line(s)") for note in run.notes)


def test_a_folder_that_is_missing_or_empty_is_one_clear_line(tmp_path):
    with pytest.raises(ReportError, match=r"nowhere is not a folder; give the --work"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ReportError, match="neither summary.json nor metrics.jsonl"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"cannot read .*summary\.json"),
        ("[]", r"summary\.json must hold a JSON object, not list"),
        ('{"results": [1]}', r"'results' must be an object, got \[1\]"),
        ('{"results": {"a": null}}', "'results' of 'a' must be an object, got None"),
        ('{"stages": {}}', "'stages' must be a list"),
        ('{"stages": [{"steps": 1}]}', "every stage must be an object with a 'name'"),
    ],
)
def test_a_damaged_summary_is_named(segmentation_run, content, message):
    workdir = segmentation_run()
    (workdir / "summary.json").write_text(content)
    with pytest.raises(ReportError, match=message) as error:
        read_run(workdir)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": None}, "lacks truth"),
        ({"truth": np.zeros(12, int)}, r"'truth' has shape \(12,\), which is not that"),
        ({"image": np.zeros((12, 64, 64))}, "'image' must be uint8"),
        ({"image": np.zeros((3, 64, 64), np.uint8)}, "with n = 12, got uint8"),
        ({"image": np.zeros((12, 9, 9), np.uint8)}, "'truth' has shape"),
        ({"prediction/teacher": np.zeros((12, 64, 64))}, "must be integers"),
        ({"prediction/teacher": np.zeros((12, 9, 9), int)}, "'prediction/teacher' has"),
        ({"index": np.zeros(3, int)}, "'index' has shape"),
        ({"probabilities/x": np.zeros(3)}, "'probabilities/x' has shape"),
        ({"confusion/x": np.zeros((2, 3), int)}, "'confusion/x' has shape"),
    ],
)
def test_predictions_that_do_not_belong_together_are_named(
    segmentation_run, change, message
):
    workdir = segmentation_run()
    with np.load(workdir / "predictions.npz") as file:
        arrays = {**file, **change}
    np.savez(
        workdir / "predictions.npz",
        **{key: value for key, value in arrays.items() if value is not None},
    )
    with pytest.raises(ReportError, match=message):
        read_run(workdir)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04cut off"])
def test_damaged_predictions_say_how_to_write_them_again(segmentation_run, content):
    workdir = segmentation_run()
    (workdir / "predictions.npz").write_bytes(content)
    with pytest.raises(ReportError, match=r"cannot read .*--mode=eval writes it again"):
        read_run(workdir)


def test_pickles_are_not_loaded(segmentation_run):
    workdir = segmentation_run()
    array = np.array([object()])
    np.savez(workdir / "predictions.npz", index=array, image=array, truth=array)
    with pytest.raises(ReportError, match="cannot read"):
        read_run(workdir)


def test_numbers_of_json_are_floats_or_nan():
    assert number(3) == 3.0 and number(0.5) == 0.5
    assert all(math.isnan(number(value)) for value in (None, "1", True, [1]))
