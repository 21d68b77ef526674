"""The arithmetic of the HLFD table; the runs behind it are tests/test_main.py's."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "bench" / "hlfd_table.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_hlfd_table", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _summary(results):
    return {
        "command": "c",
        "device": "1 x cpu",
        "data": {},
        "costs": {},
        "stages": [{"learner": n, "seconds": 10.0 * i} for i, n in enumerate(results)],
        "results": {
            n: {"dice": d, "iou": d / 2, "hd95": h, "assd": 1.0}
            for n, (d, h) in results.items()
        },
    }


def test_mean_and_sample_deviation_over_the_seeds_that_have_a_network(bench):
    table = bench.aggregate(
        [
            _summary({"teacher": (0.8, 4.0), "hlfd": (0.5, None)}),
            _summary({"teacher": (0.9, 6.0)}),
        ]
    )
    assert table["rows"]["teacher"]["dice"] == {
        "mean": pytest.approx(0.85),
        "std": pytest.approx(0.0707107, rel=1e-5),
        "count": 2,
    }
    assert table["rows"]["hlfd"]["dice"] == {"mean": 0.5, "std": None, "count": 1}
    assert "hd95" not in table["rows"]["hlfd"]


def test_the_markdown_shows_spread_single_values_and_gaps(bench):
    table = bench.aggregate(
        [
            _summary({"teacher": (0.8, 4.0), "hlfd": (0.5, None)}),
            _summary({"teacher": (0.9, 6.0)}),
        ]
    )
    lines = bench.markdown(table).splitlines()
    assert lines[0].startswith("| network | seeds | Dice (%) |")
    assert lines[2] == (
        "| teacher | 2 | 85.00 ± 7.07 | 42.50 ± 3.54 | 5.00 ± 1.41 | 1.00 ± 0.00 | 0 |"
    )
    assert lines[3] == "| hlfd | 1 | 50.00 | 25.00 | – | 1.00 | 10 |"


def test_a_run_that_fails_fails_the_table(bench, tmp_path):
    with pytest.raises(Exception, match="returned non-zero exit status 2"):
        bench.main(
            ["--seeds=1", f"--workdir={tmp_path}", "--", "--config.no_such_key=1"]
        )
