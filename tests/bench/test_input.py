"""bench/input.py: reading JPEG and ArrayRecord files."""

import json
import sys

import numpy as np
import pytest

SMALL = (
    "--files=4 --small-records=4 --height=24 --width=32 --image-size=16 "
    "--batch-size=2 --rounds=1 --threads=1"
).split()


@pytest.fixture(scope="module")
def bench(script):
    return script("input")


@pytest.fixture(scope="module")
def files(script, tmp_path_factory):
    return script("synthetic").write_photographs(
        tmp_path_factory.mktemp("files"), count=4, height=24, width=32
    )


def options(bench, monkeypatch, *more):
    """As for a process with one core, whatever this one has."""
    monkeypatch.setattr(bench.measuring, "limit_threads", lambda threads: None)
    return [*SMALL, *more]


def test_jpeg_files_are_read_by_a_loop_and_by_the_pipeline(bench, monkeypatch, capsys):
    assert bench.main(options(bench, monkeypatch, "--sides=pillow,jpeg")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["benchmark"] == "input"
    assert result["ratio"] > 0
    assert result["images_per_second"].keys() == {"pillow", "jpeg"}
    assert result["data"].startswith("synthetic JPEG 32x24, resized to 16")


def test_array_records_hold_the_files_and_small_images(bench, files, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    from jaxkd import data

    path = bench.prepare_array_record(tmp_path, "TestPhotographs", files)
    source = data.load("tfds", split="train", path=path, image_size=16)
    assert sorted(int(source[i]["image"].sum()) for i in range(4)) == sorted(
        int(data.load("image_folder", split="train", path=files[0].parents[2],
                      image_size=16)[i]["image"].sum()) for i in range(4)
    )  # fmt: skip
    side = bench.source_side(source, 3)
    assert (side.images, side.calls) == (3, 1)
    assert np.isfinite(side.run(2))

    images = [np.full((32, 32, 3), i, np.uint8) for i in range(4)]
    path = bench.prepare_array_record(tmp_path, "TestSmall", images)
    source = data.load("tfds", split="train", path=path)
    assert sorted(int(source[i]["image"].max()) for i in range(4)) == [0, 1, 2, 3]


def test_the_loop_counts_for_one_core_and_the_others_for_all(bench, monkeypatch):
    parsed = bench.parse([*SMALL[:-1], "--threads=2", "--sides=pillow,jpeg"])
    result = bench.summarise(parsed, {"pillow": [100.0], "jpeg": [150.0]})
    assert result["ratio"] == 1.5
    assert result["images_per_second_per_core"] == {"pillow": 100.0, "jpeg": 75.0}
    assert bench.summarise(parsed, {"jpeg": [150.0]})["ratio"] is None


def test_a_file_is_an_array_of_its_pixels(bench, files):
    assert bench.read_file(files[0], 16).shape == (16, 16, 3)
    data_set = bench.Files(files, 8)
    assert len(data_set) == 4
    assert data_set[3].dtype == np.uint8 and data_set[3].shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--sides=tensorflow", "no 'tensorflow'; known: pillow"),
        ("--files=1", "less than one batch of 2"),
        ("--threads=0", "--threads must be at least 1"),
    ],
)
def test_impossible_options_end_with_status_2(bench, capsys, argument, message):
    arguments = [*SMALL, "--sides=pillow", argument]
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_package_is_named_with_its_remedy(bench, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert bench.main([*SMALL, "--sides=pillow,torch"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "jaxkd[bench]" in line and "leave 'torch' out" in line


@pytest.mark.slow
def test_a_data_loader_of_torch_reads_the_same_files(run_script):
    pytest.importorskip("torch")
    done = run_script("input.py", *SMALL, "--sides=pillow,jpeg,torch")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images_per_second"]["torch"]["median"] > 0
