"""What the HLFD table shows; the runs behind it are those of tests/test_main.py."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "bench" / "hlfd_table.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_hlfd_table", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _summary(seed, dice):
    return {
        "status": "finished",
        "command": "c",
        "device": "1 x cpu",
        "seed": seed,
        "task": "segmentation",
        "class_names": ["background", "liver"],
        "stages": [{"learner": n, "name": n, "seconds": 12.3} for n in dice],
        "results": {n: {"dice": d, "hd95": 4.0} for n, d in dice.items()},
        "costs": {n: {"params": 1000, "macs": 10000} for n in dice},
        "versions": {},
        "notes": [],
    }


def test_rows_of_every_seed_show_their_spread_and_the_others_stand_below(bench):
    common = dict.fromkeys(bench.EVERY_SEED, 0.5)
    text = bench.tables(
        [
            _summary(0, {**common, "teacher": 0.8, "seg_at": 0.6543}),
            _summary(1, {**common, "teacher": 0.9}),
        ]
    )
    above, below = text.split("Seed 0, every method:")
    assert above.startswith("2 seeds:")
    # The sample standard deviation of 0.8 and 0.9 is 0.0707.
    [row] = [line for line in above.splitlines() if line.startswith("| teacher")]
    assert "0.8500 ± 0.0707" in row
    assert "seg_at" not in above
    assert "0.6543" in below and "12" in below and "1 x cpu" in below


def test_a_run_that_fails_fails_the_table(bench, tmp_path):
    with pytest.raises(subprocess.CalledProcessError, match="exit status 2"):
        bench.main(
            ["--seeds=1", f"--workdir={tmp_path}", "--", "--config.no_such_key=1"]
        )
