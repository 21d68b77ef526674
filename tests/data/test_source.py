"""What sources promise, and how they name damage."""

import logging
import pickle

import pytest

from jaxkd.data import DamagedFileError, SourceInfo
from jaxkd.data.source import check_split, keep_readable, require_path


def make_info(**changes):
    options = dict(
        name="set",
        task="classification",
        class_names=("a", "b"),
        image_shape=(4, 5, 1),
    )
    return SourceInfo(**{**options, **changes})


def test_the_number_of_classes_counts_the_background():
    assert make_info().num_classes == 2


def test_impossible_sources_are_refused():
    with pytest.raises(ValueError, match="set has 1 classes; at least 2"):
        make_info(class_names=("a",))
    with pytest.raises(ValueError, match=r"shape \(0, 5, 1\)"):
        make_info(image_shape=(0, 5, 1))


def test_damage_is_one_line_with_file_reason_and_remedy():
    error = DamagedFileError("a/b.png", "broken\n  at byte 7")
    assert str(error).startswith("cannot use a/b.png: broken at byte 7; replace")
    assert error.path == "a/b.png"
    assert isinstance(error, ValueError)


def test_damage_survives_the_way_from_a_worker_process():
    error = pickle.loads(pickle.dumps(DamagedFileError("a.png", "broken")))
    assert (error.path, str(error)) == (
        "a.png",
        str(DamagedFileError("a.png", "broken")),
    )


def test_damage_may_have_a_remedy_of_its_own():
    error = DamagedFileError("a.npz", "broken", "write it anew")
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert str(each) == "cannot use a.npz: broken; write it anew"
        assert each.path == "a.npz"


def check_even(number):
    if number % 2:
        raise DamagedFileError(f"{number}.png", "odd")


def test_damaged_items_are_left_out_counted_and_logged_once(caplog):
    with caplog.at_level(logging.WARNING):
        kept, skipped = keep_readable(range(5), check_even, name="x", on_error="skip")
    assert kept == [0, 2, 4]
    assert skipped == ("1.png", "3.png")
    (record,) = caplog.records
    assert record.getMessage() == ("x: left out 2 damaged file(s), the first is 1.png")


def test_without_skipping_nothing_is_read_beforehand():
    kept, skipped = keep_readable(range(5), check_even, name="x", on_error="raise")
    assert (kept, skipped) == ([0, 1, 2, 3, 4], ())


def test_other_errors_are_not_taken_for_damage():
    with pytest.raises(ZeroDivisionError):
        keep_readable([0], lambda x: 1 // x, name="x", on_error="skip")


def test_paths_and_splits_are_checked(tmp_path):
    assert require_path(str(tmp_path), "x") == tmp_path
    with pytest.raises(FileNotFoundError, match="x: there is nothing at"):
        require_path(tmp_path / "a", "x")
    check_split("train")
    with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
        check_split("val")
