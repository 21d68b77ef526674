"""Epochs on data that live on the device, beside epochs on data that are sent.

    python bench/epoch.py
    python bench/epoch.py --device=gpu --recipe=cifar100-kd

prints one JSON line; `ratio` is one dispatch per epoch on resident data over streaming.
The sides train the same student (configs/kd.py, with augmentation) on the same batches:
`streaming` sends every batch from grain's threads, `resident` sends the numbers of the
records, `resident_epoch` those of a whole epoch at once. They take turns, an epoch per
round. The data are synthetic: random uint8 images in the shape of CIFAR.

`--recipe=cifar100-kd` runs the command itself, `python -m jaxkd.main`, with the
240-epoch recipe of configs/kd.py on synthetic data in the size of CIFAR-100 and a
teacher that nobody trained, and tells seconds per epoch and for all 240 epochs: start,
compilation, evaluations and saves included, the teacher's own training not. With fewer
`--epochs` the rest is extrapolated from the time between the second evaluation and the
last, so that what happens once counts once: the first evaluation compiles, and the
first save starts Orbax.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import synthetic
from measuring import Mistake

ROOT = Path(__file__).resolve().parent.parent
# Pair, width factor of the student, training and test records.
VARIANTS = {
    "tiny": ("resnet14-resnet8", 0.25, 2048, 256),
    "full": ("resnet32x4-resnet8x4", 1.0, 50_000, 10_000),
}
SIDES = {
    "streaming": {"train.resident": False, "train.steps_per_call": 1},
    "resident": {"train.resident": True, "train.steps_per_call": 1},
    "resident_epoch": {"train.resident": True, "train.steps_per_call": "epoch"},
}
RECIPES = ("cifar100-kd",)
RECIPE_EPOCHS, TARGET_SECONDS = 240, 300
# As in configs/kd.py; saves go with the evaluations.
EVALUATE_EVERY = 10
# Evaluations that a part of the recipe needs: what comes after the second is told.
EVALUATIONS = 3
_POLL_SECONDS = 0.01


class Options(NamedTuple):
    """What is measured."""

    variant: str
    recipe: str | None
    device: str
    precision: str
    pair: str
    width: float
    records: int
    test_records: int
    batch_size: int
    epochs: int
    rounds: int


def parse(arguments: Sequence[str] | None) -> Options:
    """Reads and checks the command line."""
    parser = measuring.Parser("epoch.py", __doc__)
    parser.add_argument("--variant", choices=tuple(VARIANTS), help="full on a GPU")
    parser.add_argument("--recipe", choices=RECIPES)
    parser.add_argument("--device", choices=measuring.DEVICES, default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"))
    parser.add_argument("--pair", help="TEACHER-STUDENT")
    parser.add_argument("--width", type=float, help="width factor of the student")
    parser.add_argument("--records", type=int, help="of the training split")
    parser.add_argument("--test-records", type=int)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--epochs", type=int, default=40, help="of the recipe that are really run"
    )
    parser.add_argument("--rounds", type=int, default=5)
    values = vars(parser.parse_args(arguments))
    gpu = values["device"] == "gpu"
    values["variant"] = values["variant"] or ("full" if gpu else "tiny")
    values["precision"] = values["precision"] or ("bfloat16" if gpu else "float32")
    names = ("pair", "width", "records", "test_records")
    for name, value in zip(names, VARIANTS[values["variant"]], strict=True):
        if values[name] is None:
            values[name] = value
    options = Options(**values)
    measuring.at_least(options, 1, "batch_size", "epochs", "rounds", "test_records")
    measuring.at_least(options, 2, "records", "test_records")
    if options.records < options.batch_size:
        raise Mistake(
            f"--records {options.records} is less than one batch of "
            f"{options.batch_size}"
        )
    if options.recipe is not None:
        measuring.at_least(options, EVALUATIONS, "epochs")
    if options.epochs > RECIPE_EPOCHS:
        raise Mistake(f"--epochs: the recipe has {RECIPE_EPOCHS}")
    return options


def changes(options: Options, data: Path) -> dict[str, Any]:
    """What differs from `configs/kd.py:TEACHER-STUDENT`."""
    return {
        **synthetic.teaching(data),
        "data.batch_size": options.batch_size,
        "networks.student.width_factor": options.width,
        "precision": options.precision,
    }


def compare(options: Options, data: Path) -> dict[str, Any]:
    """Trains epochs in all three ways, in turns."""
    import programs

    trainings, sides = {}, {}
    for name, train in SIDES.items():
        config = programs.configured(
            f"kd.py:{options.pair}", {**changes(options, data), **train}
        )
        setup = programs.set_up(config)
        stage = setup.stages[0]
        training = programs.Training(setup, stage)
        trainings[name] = training
        sides[name] = training.side(steps=stage.steps_per_epoch)
    rates = measuring.take_turns(sides, rounds=options.rounds)
    for training in trainings.values():
        training.close()
    steps = sides["streaming"].calls
    return {
        "benchmark": "epoch",
        "ratio": measuring.ratio_of(rates["resident_epoch"], rates["streaming"]),
        "ratios": {
            name: measuring.ratio_of(rates[name], rates["streaming"])
            for name in ("resident", "resident_epoch")
        },
        "images_per_second": {k: measuring.spread(v) for k, v in rates.items()},
        "epoch_seconds": {
            name: round(steps * options.batch_size / measuring.spread(v)["median"], 4)
            for name, v in rates.items()
        },
        "steps_per_epoch": steps,
        "rounds": options.rounds,
    }


def recipe_arguments(options: Options, data: Path, workdir: Path) -> list[str]:
    """The arguments of the command that runs the recipe."""
    steps = options.records // options.batch_size
    optimizer = {}
    if options.epochs < RECIPE_EPOCHS:
        # The rate drops at epochs that a part of the recipe does not reach.
        prefix = "stages.student.optimizer"
        optimizer = {f"{prefix}.schedule": "constant", f"{prefix}.milestones": ()}
    every = min(EVALUATE_EVERY, options.epochs // EVALUATIONS)
    values = {
        **changes(options, data),
        **SIDES["resident_epoch"],
        "stages.student.epochs": options.epochs,
        **optimizer,
        "evaluation.every_epochs": every,
        "checkpoint.every_steps": every * steps,
        "log.every_steps": steps,
    }
    return [
        f"--config={ROOT / 'configs' / 'kd.py'}:{options.pair}",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in values.items()),
    ]


def run_recipe(options: Options, data: Path, workdir: Path) -> dict[str, Any]:
    """Runs the command and tells how long all epochs take.

    Raises:
      Mistake: the command found one.
      RuntimeError: the command failed.
    """
    arguments = recipe_arguments(options, data, workdir)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda,cpu"}[options.device],
        # Programs of earlier runs would make the start look faster than it is.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    metrics = workdir / "metrics.jsonl"
    judged: list[float] = []
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "jaxkd.main", *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=said,
        ) as process:
            while process.poll() is None:
                seconds = time.perf_counter() - start
                missing = evaluations(metrics) - len(judged)
                judged += [seconds] * missing
                time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - start
        said.seek(0)
        if process.returncode == 2:
            raise Mistake(said.read().strip())
        if process.returncode:
            raise RuntimeError(
                f"the command failed ({process.returncode}): {said.read()}"
            )
    summary = json.loads((workdir / "summary.json").read_text())
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return times(options, seconds, summary, records, judged)


def evaluations(metrics: Path) -> int:
    """How many evaluations a run has recorded so far."""
    return metrics.read_bytes().count(b'"kind": "eval"') if metrics.exists() else 0


def times(
    options: Options,
    seconds: float,
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    judged: Sequence[float],
) -> dict[str, Any]:
    """The times of the recipe from what a run of some of its epochs left behind.

    Args:
      options: what was run.
      seconds: wall time of the whole process.
      summary: its `summary.json`.
      records: its `metrics.jsonl`; every epoch has a training record.
      judged: when each of its evaluations was recorded, from the start on.
    """
    (stage,) = summary["stages"]
    compiling = sum(p["compile_seconds"] for p in stage["programs"].values())
    trained = [record for record in records if record["kind"] == "train"]
    epochs = [record["epoch"] for record in records if record["kind"] == "eval"]
    steps = stage["steps"] / options.epochs
    # The second evaluation and what came before may have done something for all.
    second = epochs[1]
    in_steps = steps * statistics.fmean(
        record["step_seconds"] for record in trained if record["epoch"] > second
    )
    later = judged[-1] - judged[1] - (epochs[-1] - second) * in_steps
    per_evaluation = max(later / (len(epochs) - 2), 0.0)
    per_epoch = in_steps + per_evaluation / EVALUATE_EVERY
    missing = RECIPE_EPOCHS - options.epochs
    first, last = trained[0], trained[-1]
    return {
        "benchmark": "recipe",
        "recipe": options.recipe,
        "recipe_seconds": round(seconds + missing * per_epoch, 2),
        "recipe_is": "extrapolated" if missing else "measured",
        "recipe_epochs": RECIPE_EPOCHS,
        "target_seconds": TARGET_SECONDS,
        "epochs": options.epochs,
        "epoch_seconds": round(per_epoch, 4),
        "epoch_seconds_in_steps": round(in_steps, 4),
        "images_per_second": round(stage["images_per_second"], 1),
        "start_and_end_seconds": round(seconds - stage["seconds"], 2),
        "compile_seconds": round(compiling, 2),
        "measured_seconds": round(seconds, 2),
        "teacher_share": last["teacher_share"],
        "flops_per_second": last.get("flops_per_second"),
        "ceiling_share": last.get("ceiling_share"),
        "loss": [first["loss"], last["loss"]],
        "run_device": summary["device"],
    }


def work(options: Options) -> dict[str, Any]:
    """Measures on synthetic data."""
    with tempfile.TemporaryDirectory() as folder:
        data = synthetic.write_cifar(
            Path(folder, "synthetic.npz"),
            train=options.records,
            test=options.test_records,
        )
        if options.recipe is None:
            result = compare(options, data)
        else:
            result = run_recipe(options, data, Path(folder, "run"))
    return {
        **result,
        "pair": options.pair,
        "width": options.width,
        "data": synthetic.CIFAR,
        "records": options.records,
        "test_records": options.test_records,
        "batch_size": options.batch_size,
        "dtype": options.precision,
    }


def measure(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Measures what the command line asks for."""
    options = parse(arguments)
    # The command needs the device itself.
    elsewhere = options.recipe is not None
    return measuring.report(options, work, elsewhere=elsewhere)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints one JSON line, returns the exit status."""
    return measuring.end(measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
