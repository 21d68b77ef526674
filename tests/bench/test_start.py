"""bench/start.py: imports, and cold and warm starts, in processes of their own."""

import json
import os
import sys

import pytest


@pytest.fixture(scope="module")
def start(script):
    return script("start")


def command(body):
    """A process that does this with `path`, the file of metrics."""
    code = f"import pathlib, sys, time; path = pathlib.Path(sys.argv[1]); {body}"
    return [sys.executable, "-c", code]


def run(start, workdir, body, *, timeout=60.0):
    workdir.mkdir(exist_ok=True)
    arguments = [*command(body), str(workdir / "metrics.jsonl")]
    return start.first_step_seconds(arguments, workdir, os.environ, timeout=timeout)


def test_a_start_ends_with_the_first_training_record(start, tmp_path):
    # The process would go on for much longer than the test may take.
    body = """path.write_text('{"kind": "train"}\\\\n'); time.sleep(1000)"""
    assert 0 < run(start, tmp_path, body) < 200


def test_records_of_other_kinds_are_no_step(start, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert not start.has_trained(metrics)
    metrics.write_text('{"kind": "eval", "step": 1}\n')
    assert not start.has_trained(metrics)
    metrics.write_text('{"kind": "eval"}\n{"kind": "train", "step": 1}\n')
    assert start.has_trained(metrics)


def test_a_run_that_ends_or_hangs_before_its_first_step_is_told(start, tmp_path):
    with pytest.raises(start.Mistake, match="ended with 3 .* step: so it goes"):
        run(start, tmp_path, "print('so it goes'); sys.exit(3)")
    with pytest.raises(start.Mistake, match="took too long before its first step"):
        run(start, tmp_path, "time.sleep(1000)", timeout=0.05)


def test_cold_starts_have_an_empty_home_and_warm_ones_the_same(start, tmp_path):
    seen = []

    def fake(command, workdir, variables, *, timeout):
        seen.append((variables["HOME"], variables["XDG_CACHE_HOME"], workdir, command))
        return 4.0 if len(seen) % 2 else 1.0

    options = start.parse(["--rounds=2", "--stage=student"])
    assert start.starts(options, tmp_path, fake) == {"cold": [4, 4], "warm": [1, 1]}
    homes, caches, workdirs, commands = zip(*seen, strict=True)
    assert homes[0] == homes[1] != homes[2] == homes[3]
    assert all(
        cache.startswith(home) for home, cache in zip(homes, caches, strict=True)
    )
    assert len(set(workdirs)) == 4
    assert "--config.run=('student',)" in commands[0]
    assert commands[0][3].endswith("configs/kd.py:smoke")


def test_settings_of_jax_do_not_reach_the_runs(start, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    variables = start.environment(tmp_path, "cpu")
    assert "JAX_COMPILATION_CACHE_DIR" not in variables
    assert variables["JAX_PLATFORMS"] == "cpu"
    assert variables["PYTHONPATH"] == f"{start.ROOT}{os.pathsep}elsewhere"


def test_an_import_costs_what_it_adds_to_the_interpreter(start):
    result = start.summarise(
        {"python": [0.1, 0.2, 0.3], "jax": [1.0, 1.2, 1.4], "jaxkd": [0.3, 0.25, 0.2]},
        {"cold": [10.0, 12.0], "warm": [4.0, 4.0]},
    )
    assert result["import_jax_seconds"] == 1.0
    assert result["import_jaxkd_seconds"] == 0.05
    assert result["ratio"] == 2.75
    assert result["first_step_seconds"]["cold"]["rounds"] == [10.0, 12.0]


def test_imports_are_timed_in_processes_of_their_own(start, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "IMPORTS", {"python": "pass", "jaxkd": "import jaxkd"})
    seconds = start.imports(start.parse(["--rounds=2"]), tmp_path)
    assert {name: len(v) for name, v in seconds.items()} == {"python": 2, "jaxkd": 2}
    assert min(seconds["jaxkd"]) > 0


def test_impossible_options_end_with_status_2(start, capsys):
    assert start.main(["--rounds=0"]) == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_run_starts_cold_and_warm(run_script):
    done = run_script("start.py", "--rounds=1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["benchmark"] == "start"
    assert result["first_step_seconds"]["cold"]["median"] > 0
    assert result["import_jaxkd_seconds"] < result["process_seconds"]["jaxkd"]["median"]
