"""bench/shrink.py: dense, masked and shrunk networks."""

import json

import pytest


@pytest.fixture(scope="module")
def shrink(script):
    return script("shrink")


def test_masked_and_shrunk_networks_give_the_same_logits(shrink):
    options = shrink.parse(
        ["--network=resnet8", "--batch-size=2", "--image-size=8", "--classes=3"]
    )
    sides, costs = shrink.make_sides(options)
    sums = {name: side.run(1) for name, side in sides.items()}
    assert sums["shrunk"] == pytest.approx(sums["masked"], rel=1e-4, abs=1e-4)
    assert sums["dense"] != pytest.approx(sums["masked"], rel=1e-3)
    assert costs["shrunk"]["macs"] < 0.7 * costs["dense"]["macs"]
    assert costs["shrunk"]["parameters"] < 0.7 * costs["dense"]["parameters"]
    assert all(side.images == 2 for side in sides.values())


def test_the_line_compares_with_the_dense_network(shrink):
    options = shrink.parse([])
    rates = {"dense": [2.0, 4.0], "masked": [3.0, 3.0], "shrunk": [6.0, 6.0]}
    line = shrink.summarise(options, rates, {}, load=None)
    assert line["ratio"] == 2.0 and line["ratio_of_masked"] == 1.0
    assert line["images_per_second"]["dense"]["rounds"] == [2.0, 4.0]
    json.dumps(line)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--keep=0", "--keep must be in"),
        ("--rounds=0", "--rounds must be at least 1"),
    ],
)
def test_impossible_options_end_with_status_2(shrink, capsys, argument, message):
    assert shrink.main([argument]) == 2
    assert message in capsys.readouterr().err


def test_unknown_networks_are_named(shrink):
    with pytest.raises(shrink.Mistake, match="no network 'resnet21'; known"):
        shrink.make_sides(shrink.parse(["--network=resnet21"]))
