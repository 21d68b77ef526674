"""The first sentence says what came out, with the sign that it has."""

import json

from jaxkd.report import story
from jaxkd.report.run import read_run


def changed(workdir, **values):
    content = json.loads((workdir / "summary.json").read_text()) | values
    (workdir / "summary.json").write_text(json.dumps(content))
    return read_run(workdir)


def test_the_lead_compares_the_student_with_both(segmentation_run):
    assert story.lead(read_run(segmentation_run())) == (
        "On 12 test records the student reaches Dice 0.9210: 0.0210 above the same "
        "network trained alone and 0.0102 below its teacher. It has 3.3 times fewer "
        "parameters and 25 times fewer multiply-adds than the teacher."
    )


def test_a_student_that_got_worse_is_said_to_be_below(segmentation_run):
    results = {"student_alone": {"dice": 0.93}, "student": {"dice": 0.9}}
    run = changed(segmentation_run(), results=results, costs={})
    assert story.lead(run).endswith(
        "reaches Dice 0.9000: 0.0300 below the same network trained alone."
    )


def test_a_difference_that_prints_as_zero_is_level(segmentation_run):
    results = {"student_alone": {"dice": 0.9}, "student": {"dice": 0.90001}}
    run = changed(segmentation_run(), results=results, costs={})
    assert "level with the same network trained alone" in story.lead(run)


def test_accuracy_is_compared_in_points(classification_run):
    results = {"teacher": {"accuracy": 0.9}, "student": {"accuracy": 0.85}}
    lead = story.lead(changed(classification_run(), results=results))
    assert "Top-1 85.00\u202f%: 5.00 points below its teacher" in lead


def test_other_networks_get_a_plain_sentence(segmentation_run):
    run = changed(
        segmentation_run(), results={"a": {"dice": 0.5}, "b": {"dice": 0.7}}, data={}
    )
    assert story.lead(run) == "On the test records b reaches Dice 0.7000."


def test_nothing_evaluated_is_said(segmentation_run):
    workdir = segmentation_run()
    assert "No network" in story.lead(changed(workdir, results={}))
    assert "No network" in story.lead(
        changed(workdir, results={"student": {"dice": None}})
    )


def test_a_student_as_large_as_its_teacher_saves_nothing(segmentation_run):
    same = {"params": 5, "macs": 5}
    run = changed(segmentation_run(), costs={"teacher": same, "student": same})
    assert "fewer" not in story.lead(run)
    assert not any(what == "smaller" for what, _, _ in story.tiles(run))


def test_tiles_hold_the_main_metric_the_size_and_the_time(segmentation_run):
    assert list(story.tiles(read_run(segmentation_run()))) == [
        ("teacher", "0.9312", "Dice"),
        ("student_alone", "0.9000", "Dice"),
        ("student", "0.9210", "Dice"),
        ("smaller", "3.3×", "parameters, student against teacher"),
        ("time", "3 min 3 s", "3 stages, all in all"),
    ]
