"""The files of a run's folder."""

import json
import math
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from jaxkd.training import ConfigError, Plan, Workdir
from jaxkd.training import workdir as workdir_lib
from jaxkd.training.workdir import MetricsWriter


def _lines(path):
    text = (path / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def _plan(**changes):
    config = {
        "run": ("student",),
        "networks": {"student": {"name": "resnet8"}},
        "data": {"source": "digits", "batch_size": 8},
        "stages": {
            "student": {
                "method": {"ce": {}},
                "epochs": 1,
                "optimizer": {"learning_rate": 0.1},
            }
        },
    }
    for key, value in changes.items():
        node = config
        *parents, last = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return Plan.from_config(config)


@pytest.fixture
def begun(tmp_path):
    """A folder in which a run has saved a checkpoint."""
    folder = Workdir(tmp_path)
    folder.claim(_plan())
    (tmp_path / "checkpoints" / "student" / "4").mkdir(parents=True)
    return folder


def test_claim_writes_the_resolved_config_with_versions(tmp_path):
    Workdir(tmp_path / "a" / "b").claim(_plan())
    record = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert record["config"]["data"]["batch_size"] == 8
    assert record["config"]["stages"]["student"]["optimizer"]["momentum"] == 0.9
    assert record["versions"]["jax"] == jax.__version__
    assert set(record) == {"config", "versions", "git_revision"}


def test_a_folder_of_another_config_is_refused_key_by_key(begun):
    begun.claim(_plan())
    with pytest.raises(ConfigError, match=r"config\.data\.batch_size: 8 -> 16"):
        begun.claim(_plan(data__batch_size=16))
    with pytest.raises(ConfigError, match=r"evaluation\.threshold: 0\.5 -> 0\.4"):
        begun.claim(_plan(evaluation__threshold=0.4))


def test_settings_that_do_not_change_the_training_may_differ(begun):
    begun.claim(
        _plan(
            data__workers=2,
            data__on_error="skip",
            log__every_steps=3,
            checkpoint__keep=2,
            mesh__fsdp=2,
            notes=("other",),
        )
    )
    record = json.loads((begun.path / "config.json").read_text())
    assert record["config"]["data"]["workers"] == 2


def test_evaluating_again_may_evaluate_otherwise(begun):
    before = (begun.path / "config.json").read_bytes()
    begun.check(_plan(evaluation__threshold=0.4), free=("evaluation",))
    assert (begun.path / "config.json").read_bytes() == before
    with pytest.raises(ConfigError, match=r"config\.seed: 0 -> 1"):
        begun.check(_plan(seed=1), free=("evaluation",))


def test_a_folder_in_which_nothing_began_takes_any_config(tmp_path):
    folder = Workdir(tmp_path)
    folder.claim(_plan())
    folder.claim(_plan(seed=1))
    assert json.loads((tmp_path / "config.json").read_text())["config"]["seed"] == 1


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to .*file"):
        Workdir(tmp_path / "file" / "run").claim(_plan())


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"cannot read .*config\.json"), ("{}", "is damaged: it has no 'config'")],
)
def test_a_damaged_config_file_is_reported(begun, text, message):
    (begun.path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        begun.claim(_plan())


def test_a_damaged_summary_is_reported(tmp_path):
    (tmp_path / "summary.json").write_text('{"status": "finished"}')
    with pytest.raises(ConfigError, match="is damaged: it has no 'stages'"):
        Workdir(tmp_path).summary()


def test_damaged_predictions_are_written_anew(tmp_path, caplog):
    (tmp_path / "predictions.npz").write_bytes(b"PK half a file")
    folder = Workdir(tmp_path)
    folder.add_predictions({"truth": np.arange(3)})
    assert "is damaged" in caplog.text
    assert sorted(folder.predictions()) == ["truth"]


def test_summary_turns_nan_into_null_and_numpy_into_numbers(tmp_path):
    folder = Workdir(tmp_path)
    assert folder.summary() == {}
    parts = {"stages": [], "results": {}}
    folder.write_summary(
        {"a": math.nan, "b": np.float32(1.5), "c": [np.int64(2)], **parts}
    )
    assert folder.summary() == {"a": None, "b": 1.5, "c": [2], **parts}
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
    for stage in ("first", "second"):
        writer.rewind(stage, 0, finished=[])
        terms = {"ce": 0.1}
        writer.write(
            {"kind": "train", "stage": stage, "step": 1, "loss": 0.5, "terms": terms}
        )
    writer.close()
    assert sorted(p.name for p in (tmp_path / "tb").iterdir()) == ["first", "second"]
    [file] = (tmp_path / "tb" / "second").iterdir()
    content = file.read_bytes()
    assert b"train/loss" in content and b"train/ce" in content


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


def test_devices_of_several_processes_are_told(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert workdir_lib.describe_device() == "8 x cpu in 2 processes"


def test_the_first_process_claims_the_folder_for_all(tmp_path):
    folder = Workdir(tmp_path)
    assert not folder.claimed(_plan())
    folder.claim(_plan())
    assert folder.claimed(_plan())
    assert not folder.claimed(_plan(seed=5))


def test_other_processes_wait_for_a_file_that_appears_late(tmp_path, monkeypatch):
    folder, other = Workdir(tmp_path), Workdir(tmp_path)
    other.writes = False
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            folder.claim(_plan())

    clock = types.SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
    monkeypatch.setattr(workdir_lib, "time", clock)
    assert other.claimed(_plan())
    assert len(waits) == 3
    monkeypatch.setattr(workdir_lib, "_VISIBLE_SECONDS", 0)
    assert not other.claimed(_plan(seed=5))


def test_progress_is_what_is_finished_and_what_is_saved(begun, tmp_path):
    assert begun.progress() == ([], ["student/4"])
    (tmp_path / "checkpoints" / "student" / "12").mkdir()
    begun.write_summary({"stages": [{"name": "teacher"}], "results": {}})
    assert begun.progress() == (["teacher"], ["student/12", "student/4"])
    assert Workdir(tmp_path / "new").progress() == ([], [])


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
