"""Galleries show the right records with the right words."""

import numpy as np
import pytest

from jaxkd import metrics
from jaxkd.report import galleries
from jaxkd.report.run import read_run


def edit(workdir, **arrays):
    with np.load(workdir / "predictions.npz") as file:
        np.savez(workdir / "predictions.npz", **{**file, **arrays})
    return read_run(workdir)


def test_rows_run_from_the_students_best_slice_to_its_worst(segmentation_run):
    rows = galleries.slice_rows(read_run(segmentation_run()), key="r", per_group=1)
    # The synthetic student is shifted further on every record.
    assert [row.cells[0].caption for row in rows] == [
        "test record 100",
        "test record 105",
        "test record 111",
    ]
    assert [row.group for row in rows] == ["Best", "Median", "Worst"]
    assert len({row.key for row in rows}) == 3


def test_a_group_is_named_once_and_few_rows_have_no_groups(segmentation_run):
    run = read_run(segmentation_run())
    rows = galleries.slice_rows(run, key="r", per_group=3)
    assert [row.group for row in rows] == [
        *("Best", "", ""),
        *("Median", "", ""),
        *("Worst", "", ""),
    ]
    all_rows = galleries.slice_rows(run, key="r", per_group=5)
    assert len(all_rows) == 12 and {row.group for row in all_rows} == {""}


def test_a_row_shows_image_truth_and_networks_in_order(segmentation_run):
    run = read_run(segmentation_run())
    row = galleries.slice_rows(run, key="r", per_group=1)[2]
    assert [cell.title for cell in row.cells] == [
        "image",
        "truth",
        "teacher",
        "student_alone",
        "student",
    ]
    truth = run.predictions["truth"][11] > 0
    found = run.predictions["prediction/student"][11] > 0
    assert row.cells[4].caption == f"Dice {metrics.dice(found, truth):.3f}"
    right = int((found & truth).sum())
    assert f"student: Dice {metrics.dice(found, truth):.3f}, {right} pixels right" in (
        row.cells[4].alt
    )
    assert row.cells[1].caption == "liver"


def test_slices_without_target_are_shown_only_if_there_are_no_others(segmentation_run):
    workdir = segmentation_run()
    truth = read_run(workdir).predictions["truth"].copy()
    truth[3:] = 0
    rows = galleries.slice_rows(edit(workdir, truth=truth), key="r", per_group=3)
    assert [row.cells[0].caption for row in rows] == [
        f"test record {i}" for i in (100, 101, 102)
    ]
    rows = galleries.slice_rows(edit(workdir, truth=0 * truth), key="r", per_group=9)
    assert len(rows) == 12
    assert rows[0].cells[1].caption == "empty"


def test_small_targets_get_a_detail(segmentation_run):
    workdir = segmentation_run(size=128)
    assert not galleries.slice_rows(read_run(workdir), key="r", per_group=1)[0].zoomed
    truth = np.zeros((12, 128, 128), int)
    truth[:, 60:66, 20:26] = 1
    same = {f"prediction/{n}": truth for n in ("teacher", "student_alone", "student")}
    row = galleries.slice_rows(
        edit(workdir, truth=truth, **same), key="r", per_group=1
    )[0]
    assert row.zoomed and row.box[2:] == (48, 48)
    assert row.detail != row.image and row.cells[0].whole


def test_cards_run_from_sure_and_right_to_sure_and_wrong(classification_run):
    cards = galleries.image_cards(read_run(classification_run()), per_group=2)
    assert [card.title for card in cards] == [
        f"test record {i}" for i in (0, 1, 19, 20, 38, 39)
    ]
    assert [card.group for card in cards] == ["Best", "", "Median", "", "Worst", ""]
    best, worst = cards[0], cards[-1]
    assert best.truth == "class 0" and best.answers[2].right
    assert best.answers[2].sureness == "90%"
    assert not worst.answers[2].right and worst.answers[2].name == "class 0"
    assert "student says class 0" in worst.alt


def test_cards_do_without_probabilities(classification_run):
    workdir = classification_run()
    with np.load(workdir / "predictions.npz") as file:
        kept = {k: v for k, v in file.items() if not k.startswith("probabilities")}
    np.savez(workdir / "predictions.npz", **kept)
    cards = galleries.image_cards(read_run(workdir), per_group=2)
    assert [card.answers[2].right for card in cards] == [True] * 4 + [False] * 2
    assert cards[0].answers[0].sureness == ""


def test_a_small_confusion_matrix_is_a_table_of_counts_and_shares(classification_run):
    workdir = classification_run(classes=3, n=12)
    counts = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    run = edit(workdir, **{"confusion/student": counts})
    matrix = galleries.confusions(run)[-1]
    assert matrix.network == "student" and not matrix.image
    assert matrix.rows[0] == (
        "class 0",
        ((6, 0.75, True), (2, 0.25, False), (0, 0.0, False)),
    )
    assert matrix.rows[2][1][2] == (0, 0.0, True)
    assert matrix.worst == (
        "class 0 taken for class 1: 2 of 8",
        "class 1 taken for class 0: 1 of 4",
    )
    assert matrix.alt == "Confusion matrix of student: 9 of 12 right"


def test_a_large_confusion_matrix_is_a_picture(classification_run):
    matrix = galleries.confusions(read_run(classification_run(classes=20)))[0]
    assert matrix.rows == () and matrix.image.startswith("data:image/png;base64,")


@pytest.mark.parametrize(("label", "name"), [(1, "liver"), (2, "2"), (-1, "-1")])
def test_classes_without_a_name_are_numbers(segmentation_run, label, name):
    assert galleries.class_name(read_run(segmentation_run()), label) == name
