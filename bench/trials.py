"""Networks trained several ways, each with several seeds in one program.

A *trial* is a stage of a small image classifier; trials differ by what is selected or
how the network is compressed. What belongs to every trial is here: the data, the
config, a run in a temporary folder, and the table.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import numpy as np
from measuring import Mistake

DATA = ("digits", "npz")


class Task(NamedTuple):
    """What every trial trains on, and how.

    Attributes:
      data: "digits", or "npz" for a file of images.
      path: that file, see `npz` in the documentation of the data sources.
      records: training records at most, the first ones of the file; None for all.
      network: name of the student's family.
      width: its width factor.
      epochs: of a trial.
      batch_size: records of a step.
      learning_rate: peak of a cosine.
      seeds: how many, trained together.
      augment: whether images are shifted and mirrored.
    """

    data: str
    path: str | None
    records: int | None
    network: str
    width: float
    epochs: int
    batch_size: int
    learning_rate: float
    seeds: int
    augment: bool = True


def add_options(parser: Any) -> None:
    """Adds the options of a `Task` to a command line."""
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--path", help="of --data=npz")
    parser.add_argument("--records", type=int, help="training records at most")
    parser.add_argument("--network", default="resnet8")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=3)


def task_of(options: Any, **changes: Any) -> Task:
    """The task that a command line asks for.

    Raises:
      Mistake: options that do not go together.
    """
    if (options.data == "npz") != (options.path is not None):
        raise Mistake("--path goes with --data=npz, which needs it")
    if options.seeds < 2:
        raise Mistake(f"--seeds must be at least 2, got {options.seeds}")
    given = {name: getattr(options, name) for name in Task._fields if name != "augment"}
    return Task(**{**given, **changes})


def choose(
    trials: Mapping[str, Mapping[str, Any]], names: str | None
) -> dict[str, Mapping[str, Any]]:
    """The trials that a command line names, separated by semicolons; None for all.

    Raises:
      Mistake: there is no such trial.
    """
    if names is None:
        return dict(trials)
    chosen = [name.strip() for name in names.split(";")]
    for name in chosen:
        if name not in trials:
            raise Mistake(
                f"--trials: no trial {name!r}; separate names of {'; '.join(trials)} "
                "with semicolons"
            )
    return {name: trials[name] for name in chosen}


def config(task: Task, trial: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config of a trial.

    Args:
      task: what every trial shares.
      trial: changes to the network (`network`), to the stage (`stage`), to the data
        (`augment`), and more `stages` before it with their `networks`.
      folder: for files that the run reads.
    """
    source: dict[str, Any] = {"source": "digits"}
    if task.data == "npz":
        source = {"source": "npz", "path": str(_shortened(task, folder))}
    optimizer = {
        "name": "sgd",
        "learning_rate": task.learning_rate,
        "schedule": "cosine",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "clip_norm": 5.0,
    }
    augment: dict[str, Any] = {"pad_crop": 1} if task.data == "digits" else {
        "flip": "horizontal",
        "pad_crop": 4,
        "mean": (0.5071, 0.4865, 0.4409),
        "std": (0.2673, 0.2564, 0.2762),
    }  # fmt: skip
    if not trial.get("augment", task.augment):
        augment = {k: v for k, v in augment.items() if k in ("mean", "std")}
    network = {"name": task.network, "width_factor": task.width}
    common = {"method": {"ce": {}}, "optimizer": optimizer, "epochs": task.epochs}
    before = {
        name: {**common, **stage} for name, stage in trial.get("stages", {}).items()
    }
    networks = {
        name: {**network, **own} for name, own in trial.get("networks", {}).items()
    }
    return {
        "seeds": tuple(range(task.seeds)),
        "run": (*before, "student"),
        "networks": {**networks, "student": {**network, **trial.get("network", {})}},
        "data": {**source, "batch_size": task.batch_size, "augment": augment},
        "stages": {**before, "student": {**common, **trial.get("stage", {})}},
        "train": {"resident": True},
        "evaluation": {"every_epochs": None},
        "log": {"every_steps": 10},
    }


def run(task: Task, trial: Mapping[str, Any]) -> dict[str, Any]:
    """Trains a trial and tells how well, at what cost.

    Returns:
      `accuracy` and its `deviation` over seeds (percent), `by_seed`, `params` and
      `macs` of the network, its `effective_macs` and `weight_bytes` without what is
      masked, `training_macs` of all its steps and seeds (as the program asks for
      them), the last `facts` of its log, `seconds`.

    Raises:
      Mistake: the config is wrong.
    """
    from jaxkd.training import ConfigError, Plan, StopSignal, Workdir, make_setup
    from jaxkd.training import run as train
    from jaxkd.training.loop import load_variables
    from jaxkd.training.networks import costs_of

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            setup = make_setup(Plan.from_config(config(task, trial, Path(folder))))
        except ConfigError as error:
            raise Mistake(str(error)) from error
        workdir = Workdir(Path(folder) / "run")
        workdir.claim(setup.plan)
        with StopSignal() as stop:
            summary = train(setup, workdir, command="bench", stop=stop)
        finished = [stage["name"] for stage in summary["stages"]]
        variables = load_variables(setup, workdir, "student", finished)
        sizes = costs_of(
            setup.networks["student"],
            setup.seeds.each(variables)[0],
            setup.train.info.image_shape,
        )
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    last = [r for r in records if r["kind"] == "train" and r["stage"] == "student"][-1]
    scores = [100 * s["accuracy"] for s in summary["by_seed"]["student"]]
    costs = setup.costs["student"]
    return {
        "accuracy": round(statistics.fmean(scores), 2),
        "deviation": round(statistics.stdev(scores), 2),
        "by_seed": [round(score, 2) for score in scores],
        "params": costs.params,
        "macs": costs.macs,
        "effective_macs": sizes.total("effective_macs"),
        "weight_bytes": sizes.total("bytes"),
        "training_macs": _training_macs(summary),
        "facts": last.get("facts", {}),
        "seconds": round(time.monotonic() - start, 1),
    }


def _training_macs(summary: Mapping[str, Any]) -> float | None:
    """Multiply-accumulates of the last stage, as its program asks for them."""
    stage = summary["stages"][-1]
    for steps, report in stage["programs"].items():
        if report["flops"] is not None:
            return report["flops"] / int(steps) / 2 * stage["steps"]
    return None


def _shortened(task: Task, folder: Path) -> Path:
    """The file of images with the first training records alone."""
    path = Path(task.path or "")
    if task.records is None:
        return path
    with np.load(path) as arrays:
        kept = {
            name: values[: task.records] if name.startswith("train_") else values
            for name, values in arrays.items()
        }
    shortened = folder / "records.npz"
    np.savez(shortened, **kept)
    return shortened


def table(results: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The trials as Markdown.

    Args:
      results: of `run`, by name.
      columns: facts to show beside the accuracy.
    """
    head = ["trial", "accuracy, %", "MMAC", "effective MMAC", "training GMAC", *columns]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for name, result in results.items():
        macs, facts = result["training_macs"], result["facts"]
        told = [f"{facts[c]:.3g}" if c in facts else "" for c in columns]
        score = f"{result['accuracy']:.1f} ± {result['deviation']:.1f}"
        cost = "" if macs is None else f"{macs / 1e9:,.0f}"
        macs = [f"{result[k] / 1e6:,.1f}" for k in ("macs", "effective_macs")]
        lines.append(f"| {' | '.join([name, score, *macs, cost, *told])} |")
    return "\n".join(lines)


def run_all(task: Task, trials: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Runs trials one after the other, telling how it goes on standard error."""
    results = {}
    for name, trial in trials.items():
        print(f"{name} ...", file=sys.stderr)
        results[name] = run(task, trial)
        told = results[name]
        print(
            f"{name}: {told['accuracy']} ± {told['deviation']} in {told['seconds']} s",
            file=sys.stderr,
        )
    return results


def overhead(
    task: Task, timed: Mapping[str, Mapping[str, Any]], options: Any
) -> dict[str, Any]:
    """Step times of trials over that of the first one.

    Args:
      task: what every trial trains on.
      timed: the trials; only the step of their last stage counts.
      options: `rounds`, and `steps` of a round.

    Returns:
      For each trial `ratio`, the first one's images per second over its own, and
      `images_per_second`.
    """
    import programs

    trainings = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, trial in timed.items():
            plan = {**config(task, trial, Path(folder)), "seeds": (), "seed": 0}
            setup = programs.set_up(plan)
            trainings[name] = programs.Training(setup, setup.stages[0], repeat=True)
        sides = {n: t.side(steps=options.steps) for n, t in trainings.items()}
        rates = measuring.take_turns(sides, rounds=options.rounds)
        for training in trainings.values():
            training.close()
    first = rates[next(iter(timed))]
    return {
        name: {
            "ratio": measuring.ratio_of(first, values),
            "images_per_second": measuring.spread(values),
        }
        for name, values in rates.items()
    }
