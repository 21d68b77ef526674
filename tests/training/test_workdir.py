"""The files of a run's folder."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxkd.training import ConfigError, Workdir
from jaxkd.training import workdir as workdir_lib
from jaxkd.training.workdir import MetricsWriter


def _lines(path):
    text = (path / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_claim_writes_the_config_with_versions(tmp_path):
    folder = Workdir(tmp_path / "a" / "b")
    folder.claim({"seed": 0, "pair": (1, 2)})
    record = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert record["config"] == {"seed": 0, "pair": [1, 2]}
    assert record["versions"]["jax"] == jax.__version__
    assert set(record) == {"config", "versions", "git_revision"}
    folder.claim({"seed": 0, "pair": (1, 2)})


def test_a_folder_of_another_config_is_refused_key_by_key(tmp_path):
    folder = Workdir(tmp_path)
    folder.claim({"seed": 0, "data": {"batch_size": 8}})
    with pytest.raises(ConfigError, match=r"config\.data\.batch_size: 8 -> 16"):
        folder.claim({"seed": 0, "data": {"batch_size": 16}})


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to .*file"):
        Workdir(tmp_path / "file" / "run").claim({})


def test_a_damaged_config_file_is_reported(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json"):
        Workdir(tmp_path).claim({})


def test_summary_turns_nan_into_null_and_numpy_into_numbers(tmp_path):
    folder = Workdir(tmp_path)
    assert folder.summary() == {}
    folder.write_summary({"a": math.nan, "b": np.float32(1.5), "c": [np.int64(2)]})
    assert folder.summary() == {"a": None, "b": 1.5, "c": [2]}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_predictions_of_networks_are_merged(tmp_path):
    folder = Workdir(tmp_path)
    assert folder.predictions() == {}
    folder.add_predictions({"truth": np.arange(3), "prediction/a": np.zeros(3)})
    folder.add_predictions({"truth": np.arange(3), "prediction/b": np.ones(3)})
    found = folder.predictions()
    assert sorted(found) == ["prediction/a", "prediction/b", "truth"]
    np.testing.assert_array_equal(found["prediction/b"], np.ones(3))


def test_metrics_are_appended_one_line_each(tmp_path):
    writer = MetricsWriter(Workdir(tmp_path))
    writer.write({"stage": "s", "step": 1, "loss": np.float32(0.5)})
    writer.write({"stage": "s", "step": 2, "loss": math.inf})
    writer.close()
    assert _lines(tmp_path) == [
        {"stage": "s", "step": 1, "loss": 0.5},
        {"stage": "s", "step": 2, "loss": None},
    ]


def test_rewinding_drops_what_comes_again_and_half_a_line(tmp_path):
    writer = MetricsWriter(Workdir(tmp_path))
    for stage, step in [("a", 9), ("b", 2), ("b", 4), ("b", 6), ("c", 1)]:
        writer.write({"stage": stage, "step": step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "b", "st')
    writer = MetricsWriter(Workdir(tmp_path))
    writer.rewind("b", 4, finished=["a"])
    writer.write({"stage": "b", "step": 6})
    writer.close()
    assert [(r["stage"], r["step"]) for r in _lines(tmp_path)] == [
        ("a", 9),
        ("b", 2),
        ("b", 4),
        ("b", 6),
    ]


def test_tensorboard_files_are_written_when_asked(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = MetricsWriter(Workdir(tmp_path), tensorboard=True)
    writer.write(
        {"kind": "train", "stage": "s", "step": 1, "loss": 0.5, "terms": {"ce": 0.1}}
    )
    writer.close()
    [file] = (tmp_path / "tb").iterdir()
    content = file.read_bytes()
    assert b"s/train/loss" in content and b"s/train/ce" in content


def test_without_tensorboardx_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxkd\[logging\]'"):
        MetricsWriter(Workdir(tmp_path), tensorboard=True)


def test_versions_name_what_is_installed_and_what_is_not(monkeypatch):
    monkeypatch.setattr(workdir_lib, "_PACKAGES", ("jax", "no-such-package"))
    found = workdir_lib.versions()
    assert found["no-such-package"] == "not installed"
    assert found["python"] == sys.version.split()[0]


def test_no_revision_without_git(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert workdir_lib.git_revision() is None


def test_simulated_devices_are_called_simulated():
    assert workdir_lib.describe_device() == "8 x cpu (simulated on one host)"


def test_a_file_is_replaced_wholly_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "summary.json"
    target.write_text("old")
    monkeypatch.setattr(
        workdir_lib.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        workdir_lib.write_atomically(target, b"new")
    assert target.read_text() == "old"


def test_a_writer_goes_on_after_rewinding(tmp_path):
    writer = MetricsWriter(Workdir(tmp_path))
    writer.write({"stage": "a", "step": 1})
    writer.rewind("b", 0, finished=["a"])
    writer.write({"stage": "b", "step": 1})
    writer.close()
    assert [r["stage"] for r in _lines(tmp_path)] == ["a", "b"]
