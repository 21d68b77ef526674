"""Every method from the same teacher: a table of mean ± deviation over seeds.

    python bench/distill_table.py --data=digits --seeds=3 --out=docs/methods/digits.json
    python bench/distill_table.py --methods=none,kd,dkd --pair=resnet32x4-resnet8x4 \
        --data=cifar100 --path=data/cifar-100-python --epochs=240
    python bench/distill_table.py --data=sample --out=docs/methods/liver.json

For each seed the teachers are trained once, without any method's own augmentation, and
the student alone is the first row; every method then teaches the same student, from the
same initial weights, with the same batches. One
program is compiled for all seeds. Prints Markdown; `--out` also writes JSON, adding to
a file that is there if the same settings made it.

The cost of a step is measured, not counted: the median over the steps of all seeds,
divided by that of KD in the same process. A process that takes KD's scores from a file
times an epoch of KD again. Other work on the machine spoils it; `--busy` leaves it out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxkd.training import ConfigError, Plan, Setup, Stage, make_setup, sharding
from jaxkd.training.batches import train_batches
from jaxkd.training.compilation import run_once
from jaxkd.training.evaluation import Evaluation
from jaxkd.training.schema import plain
from jaxkd.training.workdir import describe_device, versions

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "configs"))

import shared  # noqa: E402

DATA = ("digits", "npz", "cifar100", "sample")
PAIRS = {
    "digits": "resnet14-resnet8",
    "npz": "resnet14-resnet8",
    "cifar100": "resnet32x4-resnet8x4",
    "sample": "unetpp-resnet18_seg",
}
# Width factors of teacher and student: a student that has something to learn.
WIDTHS = {"digits": (1.0, 0.125), "npz": (1.0, 0.25), "sample": (0.125, 0.25)}
EPOCHS = {"digits": 8, "npz": 8, "cifar100": 240, "sample": 24}
TEACHER_EPOCHS = {"sample": 8}
# Stages that the methods of a seed share, and the method whose config has them.
COMMON = ("teacher", "assistant")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is trained."""

    data: str
    path: str | None
    pair: str
    teacher_width: float
    width: float
    epochs: int
    seeds: int
    batch_size: int
    teacher_epochs: int | None = None
    busy: bool = False

    @property
    def networks(self) -> tuple[dict, dict]:
        teacher, _, student = self.pair.partition("-")
        return (
            self._network(teacher, self.teacher_width),
            self._network(student, self.width),
        )

    def _network(self, name: str, width: float) -> dict:
        network: dict[str, Any] = dict(name=name)
        if width != 1.0:
            network["width_factor"] = width
        if self.data == "cifar100" and name in ("resnet18", "resnet34", "resnet50"):
            network["stem"] = "cifar"
        return network


def main(arguments: Sequence[str] | None = None) -> int:
    with tempfile.TemporaryDirectory() as programs:
        if jax.config.jax_compilation_cache_dir is None:
            # Methods share the programs that start and judge a network.
            jax.config.update("jax_compilation_cache_dir", programs)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        try:
            return _main(arguments)
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2


def _main(arguments: Sequence[str] | None) -> int:
    options, methods, out = parse(arguments)
    command = "python bench/distill_table.py " + " ".join(
        sys.argv[1:] if arguments is None else arguments
    )
    results = read(out, options)
    bench = Bench(options)
    where = {"device": describe_device(), "versions": versions()}
    own: list[dict[str, Any]] = []
    start = time.monotonic()
    for method in methods:
        if method in results["methods"]:
            continue
        print(f"{method} ...", end=" ", file=sys.stderr, flush=True)
        try:
            results["methods"][method] = row = bench.run(method) | where
            own.append(row)
            if method != "none" and not options.busy:
                for each in own:
                    each["kd_milliseconds"] = bench.kd_milliseconds()
        except ConfigError as error:
            if method in ("none", "kd"):
                raise
            results["refused"][method] = str(error)
            print(error, file=sys.stderr)
            continue
        print(f"{mean(row['scores']):.4f}", file=sys.stderr)
        results.update(
            command=command,
            device=where["device"],
            seconds=results["seconds"] + time.monotonic() - start,
            metric=bench.metric,
            teachers={**results["teachers"], **bench.teachers()},
            versions=where["versions"],
        )
        start = time.monotonic()
        if out is not None:
            out.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))
    return 0


def parse(arguments: Sequence[str] | None) -> tuple[Options, list[str], Path | None]:
    """The options, the methods in the order of the recipes, and the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default="all", help="all, or names with commas")
    parser.add_argument("--pair", help="TEACHER-STUDENT")
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--path", help="file or folder of the data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--width", type=float, help="width factor of the student")
    parser.add_argument("--teacher-width", type=float, help="that of the teacher")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument(
        "--busy", action="store_true", help="other work runs: keep no times"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write or to add to")
    args = parser.parse_args(arguments)
    teacher_width, width = WIDTHS.get(args.data, (1.0, 1.0))
    options = Options(
        data=args.data,
        path=args.path,
        pair=args.pair or PAIRS[args.data],
        teacher_width=args.teacher_width or teacher_width,
        width=args.width or width,
        epochs=args.epochs or EPOCHS[args.data],
        seeds=args.seeds,
        batch_size=args.batch_size or (8 if args.data == "sample" else 64),
        teacher_epochs=TEACHER_EPOCHS.get(args.data),
        busy=args.busy,
    )
    known = shared.SEGMENTATION if args.data == "sample" else shared.RECIPES
    methods = list(known) if args.methods == "all" else args.methods.split(",")
    for method in methods:
        if method not in known:
            parser.error(f"no method {method!r} for {args.data}; {', '.join(known)}")
    if args.data in ("npz", "cifar100") and not args.path:
        parser.error(f"--data={args.data} needs --path")
    if options.seeds < 1 or options.epochs < 1 or "-" not in options.pair:
        parser.error("--seeds and --epochs must be > 0, --pair TEACHER-STUDENT")
    # The baseline and KD come first: every other row is set against them.
    first = [m for m in ("none", "kd") if m in known]
    return options, [*first, *(m for m in methods if m not in first)], args.out


def read(out: Path | None, options: Options) -> dict[str, Any]:
    """The results so far: those of a file made by the same settings, or none."""
    settings = dataclasses.asdict(options)
    if out is not None and out.exists():
        results = json.loads(out.read_text())
        if results["settings"] != settings:
            raise SystemExit(f"{out} was made with other settings; give another --out")
        return results
    return {
        "settings": settings,
        "methods": {},
        "refused": {},
        "teachers": {},
        "seconds": 0.0,
    }


class Bench:
    """Trains methods on shared teachers; keeps what several methods need."""

    def __init__(self, options: Options):
        self._options = options
        # By (network, seed): variables; by network: scores.
        self._variables: dict[tuple[str, int], Any] = {}
        self._scores: dict[str, list[float]] = {}
        self._kd_milliseconds: float | None = None
        self.metric = "dice" if options.data == "sample" else "accuracy"

    def teachers(self) -> dict[str, list[float]]:
        """The scores of the networks that teach."""
        return self._scores

    def run(self, method: str) -> dict[str, Any]:
        """Trains the student with a method, for every seed."""
        setup = make_setup(Plan.from_config(plain(self._config(method).to_dict())))
        own = [stage for stage in setup.stages if stage.name not in COMMON]
        self._train_missing(setup)
        variables, scores, seconds = dict(self._variables), [], []
        for stage in own:
            scores, seconds = self._train(setup, stage, variables)
        costs = setup.costs[own[-1].learners[0]]
        milliseconds = 1e3 * statistics.median(seconds)
        if method == "kd":
            self._kd_milliseconds = milliseconds
        return {
            "scores": scores,
            "milliseconds": None if self._options.busy else milliseconds,
            "params": costs.params,
            "stages": len(own),
        }

    def kd_milliseconds(self) -> float:
        """What a step of KD takes in this process; timed by an epoch if not known."""
        if self._kd_milliseconds is None:
            setup = make_setup(Plan.from_config(plain(self._config("kd").to_dict())))
            self._train_missing(setup)
            stage = setup.stages[-1]
            begin, step = programs_of(setup, stage)
            known = {name: v for (name, s), v in self._variables.items() if s == 0}
            steps = stage.steps_per_epoch
            _, seconds = train(setup, stage, begin, step, known, steps=steps)
            self._kd_milliseconds = 1e3 * statistics.median(seconds)
        return self._kd_milliseconds

    def _train_missing(self, setup: Setup) -> None:
        """Trains the networks that a run shares with others, but no one of them had."""
        for stage in setup.stages:
            if stage.name in COMMON and stage.name not in self._scores:
                self._train_common(stage.name)

    def _train_common(self, name: str) -> None:
        """Trains a teacher by a config that changes nothing about the images."""
        method = {"teacher": "kd", "assistant": "averaged_teachers"}[name]
        config = plain(self._config(method).to_dict())
        setup = make_setup(Plan.from_config(config))
        stage = next(stage for stage in setup.stages if stage.name == name)
        self._scores[name], _ = self._train(setup, stage, self._variables)

    def _train(
        self, setup: Setup, stage: Stage, variables: dict[tuple[str, int], Any]
    ) -> tuple[list[float], list[float]]:
        """Trains a stage for every seed; adds its networks to `variables`.

        Returns:
          The score of each seed, and the seconds of all steps.
        """
        evaluation = Evaluation(setup)
        begin, step = programs_of(setup, stage)
        first, scores, seconds = stage.learners[0], [], []
        for seed in range(self._options.seeds):
            plan = dataclasses.replace(setup.plan, seed=seed)
            seeded = dataclasses.replace(setup, plan=plan)
            known = {name: v for (name, s), v in variables.items() if s == seed}
            state, times = train(seeded, stage, begin, step, known)
            finals = stage.final_variables(state)
            metrics = evaluation.metrics(
                stage.members[first], finals[first], surface=False
            )
            scores.append(metrics[self.metric])
            variables.update({(name, seed): v for name, v in finals.items()})
            seconds += times
        return scores, seconds

    def _config(self, method: str) -> ConfigDict:
        options = self._options
        teacher, student = options.networks
        config = shared.base()
        if options.data == "sample":
            return self._segmentation(method)
        if options.data == "cifar100":
            config.data = shared.cifar100(options.batch_size)
            optimizer = shared.cifar100_optimizer(
                options.batch_size, epochs=options.epochs
            )
            if optimizer["milestones"][0] < 1 or len(
                set(optimizer["milestones"])
            ) < len(optimizer["milestones"]):
                optimizer = shared.digits_optimizer(options.epochs)
        else:
            config.data = shared.digits(options.batch_size)
            config.data.source = options.data
            optimizer = shared.digits_optimizer(options.epochs)
        config.data.path = options.path
        return shared.pair(
            config,
            method,
            teacher=teacher,
            student=student,
            optimizer=optimizer,
            epochs=options.epochs,
            first=max(1, options.epochs // 8),
            alone=False,
        )

    def _segmentation(self, method: str) -> ConfigDict:
        options = self._options
        teacher, student = options.networks
        config, optimizer, _ = shared.liver(smoke=False)
        config.data.image_size = 64
        config.data.batch_size = options.batch_size
        config.networks = dict(teacher=teacher, student=student)
        common = dict(optimizer=optimizer, epochs=options.epochs)
        task = dict(focal_dice=dict(weight=1.0))
        stages = dict(student=shared.segmentation_stage(method, **common))
        if method != "none":
            common["epochs"] = options.teacher_epochs or options.epochs
            stages = dict(teacher=dict(method=task, **common), **stages)
        return shared.stages(config, **stages)


def programs_of(setup: Setup, stage: Stage) -> tuple[Any, Any]:
    """What begins a stage, and its step."""
    begin = jax.jit(stage.begin, compiler_options=run_once())
    return begin, jax.jit(stage.train_step(setup.augmentation), donate_argnums=0)


def train(
    setup: Setup,
    stage: Stage,
    begin: Any,
    step: Any,
    variables: dict[str, Any],
    steps: int | None = None,
) -> tuple[Any, list[float]]:
    """Trains one stage, or some steps, and returns its state and their seconds."""
    state = begin(setup.seeds.keys(), {name: variables[name] for name in stage.starts})
    teachers = tuple(variables[t.name] for t in stage.teachers)
    iterator = iter(train_batches(setup, stage))
    times = []
    try:
        for _ in range(stage.total_steps if steps is None else steps):
            batch = sharding.put_batch(next(iterator), setup.mesh)
            start = time.perf_counter()
            state, metrics = step(state, batch, teachers)
            loss = float(metrics["loss"])
            times.append(time.perf_counter() - start)
            if not np.isfinite(loss):
                raise SystemExit(f"stage {stage.name!r}: the loss is {loss}")
    finally:
        iterator.close()
    return state, times


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(results: dict[str, Any]) -> str:
    """The table, with what was run and where."""
    methods, settings = results["methods"], results["settings"]
    metric = {"accuracy": "top-1 (%)", "dice": "Dice (%)"}[results["metric"]]
    lines = [
        f"| method | {metric} | against none | step against KD |",
        "|---|---:|---:|---:|",
    ]
    for name, scores in results["teachers"].items():
        lines.append(f"| *{name}* | {spread(scores)} | | |")
    none = methods.get("none", {}).get("scores")
    kd = methods.get("kd", {}).get("milliseconds")
    for name, row in methods.items():
        gain = ratio = ""
        if none is not None and name != "none":
            # Seeds are paired: they share teacher, initial weights and batches.
            gains = [a - b for a, b in zip(row["scores"], none, strict=True)]
            gain = f"{100 * mean(gains):+.2f} ± {100 * deviation(gains):.2f}"
        # Files of older versions have KD's time in its own row alone.
        beside = row.get("kd_milliseconds", kd)
        if beside is not None and row["milliseconds"] is not None:
            ratio = f"{row['milliseconds'] / beside:.2f}"
        lines.append(f"| `{name}` | {spread(row['scores'])} | {gain} | {ratio} |")
    devices = [row.get("device", results["device"]) for row in methods.values()]
    taught = settings["teacher_epochs"]
    teacher_epochs = "" if taught is None else f" (teacher {taught})"
    about = (
        f"{settings['pair']} (widths x {settings['teacher_width']:g} and "
        f"{settings['width']:g}), {settings['data']}, "
        f"{settings['epochs']} epochs{teacher_epochs}, {settings['seeds']} seeds, "
        f"mean ± sample deviation; {', '.join(dict.fromkeys(devices))}; "
        f"{results['seconds'] / 60:.1f} min in all.\n\n"
        f"`{results['command']}`"
    )
    refused = [
        f"`{name}` does not fit this pair: {error}"
        for name, error in results["refused"].items()
    ]
    return "\n".join([*lines, "", *refused, *([""] if refused else []), about])


def spread(scores: Sequence[float]) -> str:
    return f"{100 * mean(scores):.2f} ± {100 * deviation(scores):.2f}"


if __name__ == "__main__":
    sys.exit(main())
