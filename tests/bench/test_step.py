"""bench/step.py: what it prints, how the sides take turns, what it refuses."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "step.py"
TINY = (
    "--teacher=resnet14 --student=resnet8 --batch-size=4 --image-size=8 "
    "--steps=1 --rounds=2 --threads=1"
).split()
KEYS = {
    "benchmark",
    "ratio",
    "jax_images_per_second",
    "torch_images_per_second",
    "threads",
    "device",
    "load",
    "versions",
    "rounds",
    "steps",
    "teacher",
    "student",
    "parameters",
    "batch_size",
    "image_size",
    "dtype",
    "jax_rounds",
    "torch_rounds",
}


@pytest.fixture(scope="module")
def step():
    spec = importlib.util.spec_from_file_location("bench_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments, prelude=""):
    """Runs the script as a user would, in a process with one JAX device."""
    code = f"import runpy, sys\n{prelude}\n" + (
        f"sys.argv = [{str(SCRIPT)!r}, *{list(arguments)!r}]\n"
        f"sys.path[0] = {str(SCRIPT.parent)!r}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


def test_jaxkd_alone_prints_one_json_line_with_the_promised_keys():
    done = run("--peer=none", *TINY)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result.keys() == KEYS
    assert result["ratio"] is None
    assert result["torch_images_per_second"] is None
    assert result["jax_images_per_second"] > 0
    assert len(result["jax_rounds"]) == result["rounds"] == 2
    assert result["threads"] == 1
    assert result["device"].startswith("cpu")
    assert {"python", "jaxkd", "jax", "flax"} <= result["versions"].keys()
    assert result["parameters"] == {
        "teacher": cifar_resnet_parameters(14, (16, 16, 32, 64), classes=100),
        "student": cifar_resnet_parameters(8, (16, 16, 32, 64), classes=100),
    }


def cifar_resnet_parameters(depth, channels, *, classes):
    """Counted by hand: 3x3 kernels, two values per normalised channel, shortcuts."""
    stem, *stages = channels
    total, before = 27 * stem + 2 * stem, stem
    for width in stages:
        for _ in range((depth - 2) // 6):
            total += 9 * before * width + 9 * width * width + 4 * width
            if before != width:
                total += before * width + 2 * width
            before = width
    return total + before * classes + classes


def test_missing_torch_ends_in_one_line_that_names_the_extra():
    done = run(*TINY, prelude="sys.modules['torch'] = None")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "pip install 'jaxkd[bench]'" in line


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--rounds=0", "--rounds must be at least 1"),
        ("--threads=9999", "may use"),
        ("--peer=tensorflow", "invalid choice"),
    ],
)
def test_impossible_options_exit_with_status_2(step, capsys, argument, message):
    with pytest.raises(SystemExit, match="2"):
        step.main([argument])
    assert message in capsys.readouterr().err


def test_an_unknown_network_ends_in_one_line_with_the_known_ones(step, capsys):
    assert step.main(["--peer=none", "--student=resnet9"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no network 'resnet9'" in line
    assert "resnet8x4" in line


class FakeClock:
    """A clock that a fake side moves on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def fake_side(step, clock, log, name, seconds, *, parameters=None, loss=1.0):
    def run(steps):
        log.append((name, steps))
        clock.now += steps * seconds
        return loss

    return step.Side(run, parameters or {"teacher": 2, "student": 1})


def test_sides_take_turns_and_only_the_asked_steps_are_timed(step):
    clock, log = FakeClock(), []
    sides = {
        "jax": fake_side(step, clock, log, "jax", 0.5),
        "torch": fake_side(step, clock, log, "torch", 0.25),
    }
    rates = step.measure(sides, batch_size=8, steps=3, rounds=2, clock=clock)
    assert rates == {"jax": [16.0, 16.0], "torch": [32.0, 32.0]}
    one_round = [("jax", 1), ("jax", 3), ("torch", 1), ("torch", 3)]
    assert log == [("jax", 1), ("torch", 1), *one_round, *one_round]


def test_the_ratio_is_jaxkd_over_torch_of_medians(step):
    options = step.parse(["--rounds=3"])
    rates = {"jax": [10.0, 30.0, 20.0], "torch": [40.0, 41.0, 900.0]}
    result = step.summarise(options, rates, {"teacher": 2, "student": 1}, 0.25)
    assert result["load"] == 0.25
    assert result.keys() == KEYS
    assert result["jax_images_per_second"] == 20.0
    assert result["torch_images_per_second"] == 41.0
    assert math.isclose(result["ratio"], 20 / 41, abs_tol=1e-4)


def test_networks_of_different_sizes_are_refused(step):
    clock, log = FakeClock(), []
    sides = {
        "jax": fake_side(step, clock, log, "jax", 1.0),
        "torch": fake_side(
            step, clock, log, "torch", 1.0, parameters={"teacher": 2, "student": 3}
        ),
    }
    with pytest.raises(ValueError, match="networks differ"):
        step.measure(sides, batch_size=8, steps=1, rounds=1, clock=clock)
    assert log == []


def test_a_loss_that_is_not_finite_stops_the_measurement(step):
    clock, log = FakeClock(), []
    side = fake_side(step, clock, log, "jax", 1.0, loss=math.nan)
    with pytest.raises(FloatingPointError, match="jax: the loss is nan"):
        step.measure({"jax": side}, batch_size=8, steps=1, rounds=1, clock=clock)


def test_the_default_is_the_published_pair_at_batch_64(step):
    options = step.parse([])
    assert (options.teacher, options.student) == ("resnet32x4", "resnet8x4")
    assert (options.batch_size, options.image_size) == (64, 32)
    assert options.peer == "torch"


@pytest.mark.slow
def test_both_sides_train_networks_of_equal_size_in_one_run():
    pytest.importorskip("torch")
    done = run(*TINY)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["ratio"] > 0
    assert len(result["torch_rounds"]) == len(result["jax_rounds"]) == 2
