"""bench/stored.py: what it prints, what it counts, what it refuses."""

import json

import numpy as np
import pytest


@pytest.fixture(scope="module")
def stored(script):
    return script("stored")


@pytest.fixture(scope="module")
def result(stored, tiny):
    """A run in miniature, in this process."""
    arguments = f"--miniature --pair={tiny}-{tiny} --format=topk --views=2".split()
    return stored.measure(arguments)


def test_both_sides_are_measured_in_turns(result):
    rates = result["images_per_second"]
    assert list(rates) == ["live", "stored", "alone"]
    assert all(len(side["rounds"]) == result["rounds"] == 2 for side in rates.values())
    medians = {name: side["median"] for name, side in rates.items()}
    assert result["ratio"] == pytest.approx(
        medians["stored"] / medians["live"], rel=0.01
    )
    alone = medians["stored"] / medians["alone"]
    assert result["of_alone"] == pytest.approx(alone, rel=0.01)
    assert result["data"].startswith("synthetic")


def test_the_teachers_share_is_counted_from_the_programs(result):
    """Equal networks: a forward of one beside forward and backward of the other."""
    flops = result["gflop_per_step"]
    # A student alone computes what a student with stored answers does.
    assert flops["alone"] == flops["stored"]
    counted = flops["live"] / flops["stored"]
    assert result["counted"] == pytest.approx(counted, rel=0.02)
    # Convolution and dense layer forward are 1, their gradients at most 2; the first
    # layer needs none for its images.
    assert 1 + 1 / 3 <= result["counted"] <= 1 + 1 / 2
    assert result["share"] == pytest.approx(
        result["ratio"] / result["counted"], rel=1e-3
    )
    assert result["reached"] == (result["share"] >= result["target"] == 0.9)


def test_what_was_written_is_told(result):
    labelling = result["labelling"]
    # Of 10 classes a byte and two of half precision, and two for the rest.
    assert labelling["bytes_per_answer"] == 10 * 3 + 2
    assert labelling["answers"] == 32 and labelling["seconds"] > 0


def test_answers_are_read_by_record_if_asked(stored, tiny, tmp_path):
    options = stored.parse(["--miniature", f"--pair={tiny}-{tiny}"])
    data = stored.synthetic.write_cifar(tmp_path / "data.npz", train=16, test=4)
    setup = stored.set_up(options, data, "stored")
    whole, single = (
        stored.write_targets(setup, tmp_path / "run", by_record=by_record)
        for by_record in (False, True)
    )
    index = np.arange(16)
    first, second = whole.files(0, index), single.files(0, index)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    for shard in single.files.manifest.shards:
        (single.files.path / shard.name).unlink()
    for targets in (whole, single):
        targets.files.close()
    # Only what lies in memory outlives the files.
    assert whole.files(0, index).keys() == first.keys()
    with pytest.raises(OSError):
        single.files(0, index)


def test_the_line_is_json(stored, result, monkeypatch, capsys):
    monkeypatch.setattr(stored, "measure", lambda arguments: result)
    assert stored.main([]) == 0
    assert json.loads(capsys.readouterr().out)["benchmark"] == "stored_targets"


def test_what_a_device_means_for_the_defaults(stored):
    cpu, gpu = stored.parse([]), stored.parse(["--device=gpu", "--steps=100"])
    assert cpu.pair == gpu.pair == "resnet32x4-resnet8x4"
    assert (cpu.steps, cpu.steps_per_call, gpu.steps, gpu.steps_per_call) == (
        4,
        1,
        100,
        50,
    )
    assert (cpu.rounds, stored.parse(["--miniature"]).rounds) == (7, 2)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--records=32", "--records 32 is less than one batch of 64"),
        ("--views=0", "--views must be at least 1"),
        ("--format=zip", "invalid choice"),
        ("--threads=1000", "--threads 1000"),
    ],
)
def test_impossible_options_end_with_status_2(stored, capsys, argument, message):
    assert stored.main([argument]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_every_format_is_one_that_targets_have(stored):
    from jaxkd.training.sections import TargetsPlan

    for options in stored.FORMATS.values():
        TargetsPlan(**options)
