"""What docs/methods/own.md tells a user to write works as it stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    common = dict(epochs=1, optimizer=dict(learning_rate=0.05))
    return ConfigDict(dict(
        run=("first", "second"),
        networks=dict(
            oracle=dict(name="mine:brightness_oracle", frozen=True),
            first=dict(name="resnet8", width_factor=0.125),
            second=dict(name="resnet8", width_factor=0.125),
        ),
        data=dict(source="digits", batch_size=240),
        stages=dict(
            first=dict(teachers=("oracle",), method=dict(
                ce=dict(weight=1.0),
                gap=dict(weight=0.5, loss="mine:logit_gap", power=1.0),
            ), **common),
            second=dict(teachers=("first",), method=dict(
                ce=dict(weight=1.0),
                mine=dict(weight=2.0, name="mine:projected_pooled", scale=0.5),
            ), **common),
        ),
    ))
"""


def blocks():
    """The Python of the page that is a module of the user's."""
    page = (ROOT / "docs" / "methods" / "own.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n# mine\.py\n(.*?)```", page, re.S)
    assert len(found) == 3
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.py").write_text("\n\n".join(blocks()))
    (folder / "config.py").write_text(CONFIG)
    command = [sys.executable, "-m", "jaxkd.main", "--config=config.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(
        [*command, "--workdir=out"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return folder


def test_a_method_of_ones_own_takes_about_thirty_lines():
    method = next(block for block in blocks() if "projected_pooled" in block)
    assert len(method.strip().splitlines()) <= 32


def test_the_run_has_the_users_terms_and_networks(run):
    summary = json.loads((run / "out" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert list(summary["results"]) == ["oracle", "first", "second"]
    assert summary["costs"]["oracle"]["params"] == 0
    first, second = (stage["method"] for stage in summary["stages"])
    assert first == {"ce": 1.0, "gap": 0.5}
    assert second == {"ce": 1.0, "mine/projected_pooled": 2.0}


def test_the_records_hold_the_users_losses(run):
    text = (run / "out" / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    terms = {name for r in records if r["kind"] == "train" for name in r["terms"]}
    assert {"gap", "mine/projected_pooled"} <= terms
