"""Stages are told in order, with the curves of every term and metric."""

import json

import pytest

from jaxkd.report import stages
from jaxkd.report.run import read_run


def titles(view):
    return [chart.title for chart in view.charts]


def test_every_term_and_metric_of_a_stage_has_a_chart(segmentation_run):
    views = stages.stage_views(read_run(segmentation_run()))
    assert [view.name for view in views] == ["teacher", "student_alone", "student"]
    assert titles(views[2]) == [
        "loss",
        "focal_dice/focal",
        "focal_dice/dice",
        "hlfd/flfd",
        "hlfd/plfd",
        "Dice",
        "IoU",
        "learning rate",
    ]
    assert views[2].charts[3].hint == "weight 0.1"
    assert views[2].teachers == ("teacher",)
    assert views[2].terms[2] == ("hlfd/flfd", "0.1")


def test_facts_are_steps_time_speed_and_the_step_that_was_kept(segmentation_run):
    view = stages.stage_views(read_run(segmentation_run()))[0]
    assert dict(view.facts) == {
        "steps": "80",
        "epochs": "4",
        "time": "1 min 1 s",
        "images/s": "123",
        "kept": "step 60",
    }


def test_a_single_term_of_weight_one_is_not_drawn_twice(segmentation_run):
    workdir = segmentation_run()
    content = json.loads((workdir / "summary.json").read_text())
    content["stages"][0]["method"] = {"ce": 1.0}
    (workdir / "summary.json").write_text(json.dumps(content))
    record = {"kind": "train", "stage": "teacher", "step": 1, "terms": {"ce": 1.0}}
    (workdir / "metrics.jsonl").write_text(json.dumps(record | {"loss": 1.0}) + "\n")
    assert titles(stages.stage_views(read_run(workdir))[0]) == ["loss"]


def test_a_weight_that_is_a_schedule_is_printed_as_it_is(segmentation_run):
    workdir = segmentation_run()
    content = json.loads((workdir / "summary.json").read_text())
    content["stages"][0]["method"] = {"focal_dice/focal": "linear 0 to 1"}
    (workdir / "summary.json").write_text(json.dumps(content))
    view = stages.stage_views(read_run(workdir))[0]
    assert view.terms == (("focal_dice/focal", "linear 0 to 1"),)
    assert view.charts[1].hint == "weight linear 0 to 1"
    assert view.charts[2].hint == "unweighted"


def test_scores_per_class_share_a_chart(segmentation_run):
    views = stages.stage_views(read_run(segmentation_run(classes=3)))
    chart = next(c for c in views[0].charts if c.title == "Dice per class")
    assert [name for name, _ in chart.legend] == ["liver", "tumour"]


def test_stages_that_go_on_or_wait_say_so(segmentation_run):
    workdir = segmentation_run(status="running")
    content = json.loads((workdir / "summary.json").read_text())
    content["stages"] = content["stages"][:1]
    (workdir / "summary.json").write_text(json.dumps(content))
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    (workdir / "metrics.jsonl").write_text("\n".join(lines[:16]))
    views = stages.stage_views(read_run(workdir))
    assert [v.state for v in views] == ["finished", "unfinished", "not started"]
    assert views[1].learner == "student_alone" and dict(views[1].facts) == {
        "last step": "30"
    }
    assert views[2].charts == ()


def test_the_overview_holds_every_network(segmentation_run):
    chart = stages.overview(read_run(segmentation_run()))
    assert chart.title == "Dice while training"
    assert [name for name, _ in chart.legend] == ["teacher", "student_alone", "student"]


def test_two_stages_of_a_network_are_told_apart(segmentation_run):
    workdir = segmentation_run()
    text = (workdir / "summary.json").read_text()
    content = json.loads(text)
    content["stages"][1]["learner"] = "student"
    (workdir / "summary.json").write_text(json.dumps(content))
    lines = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(
        lines.replace('"network": "student_alone"', '"network": "student"')
    )
    names = [name for name, _ in stages.overview(read_run(workdir)).legend]
    assert names == [
        "teacher",
        "student, stage student_alone",
        "student, stage student",
    ]


def test_the_trade_off_names_quality_and_cost(segmentation_run, classification_run):
    chart = stages.trade_off(read_run(segmentation_run()))
    assert chart.points and chart.hint == "up and to the left is better"
    assert "teacher: 0.9312 at 2345 million" in chart.svg
    assert stages.trade_off(read_run(classification_run(costs={}))) is None


def test_compressed_networks_are_placed_by_what_takes_part(segmentation_run):
    run = read_run(segmentation_run())
    assert stages.size_trade_off(run) is None
    first, *_ = run.summary["costs"]
    dense = run.summary["costs"][first]["macs"]
    run.summary["costs"][first] |= {"effective_macs": dense / 4, "weight_bytes": 2048.0}
    macs, size = stages.trade_off(run), stages.size_trade_off(run)
    assert f"at {dense / 4e6:.4g} million" in macs.svg
    assert "at 2 KiB" in size.svg and "against bytes" in size.title


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({"a": {"nll": 1.0, "accuracy": 0.5}}, "accuracy"),
        ({"a": {"iou": 1.0, "dice": 0.5}}, "dice"),
        ({"a": {"psnr": 1.0, "ssim": 0.5}}, "psnr"),
    ],
)
def test_the_main_metric_stands_for_the_run(segmentation_run, results, expected):
    workdir = segmentation_run()
    content = json.loads((workdir / "summary.json").read_text()) | {"results": results}
    (workdir / "summary.json").write_text(json.dumps(content))
    (workdir / "metrics.jsonl").write_text("")
    assert stages.main_metric(read_run(workdir)) == expected


def test_times_are_said_in_words():
    words = [stages.duration(s) for s in (0.04, 59.6, 3599.4, 7300.0, float("nan"))]
    assert words == ["0.0 s", "1 min 0 s", "59 min 59 s", "2 h 2 min", "–"]
