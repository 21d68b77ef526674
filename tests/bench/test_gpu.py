"""bench/gpu.sh: what it refuses, what it tells, and the miniature."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
ALL = ("step_cifar", "step_imagenet", "epoch", "recipe", "overhead", "stored")


def run(*arguments, python=sys.executable, timeout=60, **variables):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHON": str(python), **variables},
    )


@pytest.fixture
def fake_python(tmp_path):
    """Says which script it got as JSON, and fails or hangs in some of them."""
    path = tmp_path / "fake python"
    path.write_text(
        "#!/bin/sh\n"
        'echo "{\\"script\\": \\"$1\\"}"\n'
        "case $1 in *stored.py) echo broken >&2; exit 3 ;; esac\n"
    )
    path.chmod(0o755)
    return path


def test_the_shell_can_read_it():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize("argument", ["--tiny", "--only=nothing"])
def test_unknown_arguments_end_with_status_2_and_one_line(argument, tmp_path):
    done = run(argument, OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_failure_is_told_and_does_not_stop_the_rest(fake_python, tmp_path):
    out = tmp_path / "out"
    done = run("--miniature", python=fake_python, OUT=str(out))
    assert done.returncode == 1
    status = dict(
        line.split(": ", 1) for line in (out / "status.txt").read_text().splitlines()
    )
    assert set(status) == set(ALL)
    assert status["stored"] == "failed with status 3, see log.txt"
    assert status["overhead"].startswith("done in")
    lines = (out / "results.jsonl").read_text().splitlines()
    scripts = [json.loads(line)["script"] for line in lines]
    assert scripts.count("bench/step.py") == scripts.count("bench/epoch.py") == 2
    assert "broken" in (out / "log.txt").read_text()


def test_only_what_is_wanted_runs_and_only_while_there_is_time(fake_python, tmp_path):
    only = "--only=epoch,overhead"
    done = run("--miniature", only, python=fake_python, OUT=str(tmp_path / "a"))
    assert done.returncode == 0
    assert len((tmp_path / "a" / "results.jsonl").read_text().splitlines()) == 2
    done = run(
        "--miniature", only, python=fake_python, OUT=str(tmp_path / "b"),
        SECONDS_IN_ALL="5",
    )  # fmt: skip
    assert done.returncode == 1
    assert (tmp_path / "b" / "results.jsonl").read_text() == ""
    assert "epoch: no time left" in (tmp_path / "b" / "status.txt").read_text()


def test_every_script_that_it_calls_takes_its_options(script):
    """The options of the real run, which nothing here can run."""
    text = SCRIPT.read_text().replace("\\\n", " ").replace("$gpu", "--device=gpu")
    text = text.replace('"$out/overhead.json"', "overhead.json")
    real = text[text.index("nvidia-smi >") : text.index("nvidia-smi >>")]
    called = [line.split() for line in real.splitlines() if "measure " in line]
    assert {words[1] for words in called} == set(ALL)
    for _, name, seconds, path, *options in called:
        assert int(seconds) <= 200
        parsed = script(Path(path).stem).parse(options)
        assert parsed.device == "gpu", name


@pytest.mark.slow
def test_the_miniature_runs_everything(tmp_path):
    done = run("--miniature", timeout=280, OUT=str(tmp_path))
    status = (tmp_path / "status.txt").read_text()
    assert done.returncode == 0, status + (tmp_path / "log.txt").read_text()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["benchmark"] for line in lines]
    assert {"kd_step", "epoch", "recipe", "method_overhead"} <= set(kinds)
    assert len(lines) == len(ALL)
