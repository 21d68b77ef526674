"""Training on stored teacher targets, beside running the teacher in every step.

    python bench/stored.py
    python bench/stored.py --device=gpu --precision=bfloat16

prints one JSON line. Both sides train the same student by configs/cifar100.py with KD
on the same resident data; `stored` reads what `--mode=label` would have written, in the
given format: from memory if all of it fits into 256 MiB, as the command does, else, and
with `--by-record`, every answer from its file. They take turns, round by round; `ratio`
is stored over live. `counted` is (T + S) / S, the arithmetic of the two steps as their
programs ask for it, and `share` is how much of it the ratio reaches; the target is 0.9.
It can miss it for two reasons: reading takes time, or the teacher's forward pass does
its arithmetic faster than the student's backward pass. `of_alone` tells them apart: it
is stored over a student that learns from labels and reads nothing. Data are synthetic
and networks untrained: what a step computes does not depend on either. Labelling is
timed as well, once, with compilation.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import synthetic

TARGET = 0.9
SIDES = ("live", "stored", "alone")
FORMATS = {
    "full": {"format": "full"},
    "float16": {"format": "full", "dtype": "float16"},
    "uint8": {"format": "uint8"},
    "topk": {"format": "topk", "top_k": 10, "dtype": "float16"},
}
# Pair, records, batch size, steps of a round and of a call.
KINDS = {
    "miniature": ("resnet8-resnet8", 16, 8, 2, 1),
    "cpu": ("resnet32x4-resnet8x4", 512, 64, 4, 1),
    "gpu": ("resnet32x4-resnet8x4", 20_000, 64, 200, 50),
}


class Options(NamedTuple):
    """What is measured."""

    device: str
    precision: str
    pair: str
    records: int
    batch_size: int
    steps: int
    steps_per_call: int
    rounds: int
    format: str
    views: int
    by_record: bool
    threads: int


def parse(arguments: Sequence[str] | None) -> Options:
    """Reads and checks the command line."""
    parser = measuring.Parser("stored.py", __doc__)
    parser.add_argument("--miniature", action="store_true", help="does it run?")
    parser.add_argument("--device", choices=measuring.DEVICES, default="cpu")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32"
    )
    parser.add_argument("--pair", help="TEACHER-STUDENT")
    parser.add_argument("--records", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int, help="per round")
    parser.add_argument("--steps-per-call", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--format", choices=tuple(FORMATS), default="full")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument(
        "--by-record", action="store_true", help="read answers from files, few or many"
    )
    parser.add_argument("--threads", type=int, default=measuring.usable_cores())
    values = vars(parser.parse_args(arguments))
    miniature = values.pop("miniature")
    kind = KINDS["miniature" if miniature else values["device"]]
    names = ("pair", "records", "batch_size", "steps", "steps_per_call")
    for name, value in zip(names, kind, strict=True):
        if values[name] is None:
            values[name] = value
    if values["rounds"] is None:
        values["rounds"] = 2 if miniature else 7
    options = Options(**values)
    measuring.at_least(options, 2, "records")
    measuring.at_least(
        options,
        1,
        *("batch_size", "steps", "steps_per_call", "rounds", "views", "threads"),
    )
    if options.records < options.batch_size:
        raise measuring.Mistake(
            f"--records {options.records} is less than one batch of "
            f"{options.batch_size}"
        )
    return options


def set_up(options: Options, data: Path, side: str) -> Any:
    """The objects of the run."""
    import programs

    config = programs.configured(
        f"cifar100.py:{options.pair}-kd-{options.batch_size}",
        {
            **synthetic.teaching(data),
            "precision": options.precision,
            "train.resident": True,
            "train.steps_per_call": options.steps_per_call,
        },
    )
    stage = config["stages"]["student"]
    if side == "stored":
        stage["targets"] = {**FORMATS[options.format], "views": options.views}
    elif side == "alone":
        stage.update(teachers=(), method={"ce": {}})
    return programs.set_up(config)


def write_targets(setup: Any, folder: Path, *, by_record: bool) -> Any:
    """Writes the targets of a run's only stage, as `--mode=label` does.

    Args:
      setup: the run.
      folder: its workdir.
      by_record: whether small ones are read record by record, as large ones are.
    """
    from jaxkd.training import StopSignal, Workdir
    from jaxkd.training.labelling import label
    from jaxkd.training.loop import load_variables
    from jaxkd.training.target_files import load_targets

    workdir = Workdir(folder)
    workdir.claim(setup.plan)
    for line in label(setup, workdir, command="bench/stored.py", stop=StopSignal()):
        print(line, file=sys.stderr)
    load = functools.partial(load_variables, setup, workdir, finished=[])
    targets = load_targets(setup, setup.stages[0], workdir, load)
    if by_record:
        # Copies, which reading processes get, keep nothing in memory.
        copied = pickle.loads(pickle.dumps(targets.files))
        targets = dataclasses.replace(targets, files=copied)
    return targets


def compare(options: Options, data: Path, folder: Path) -> dict[str, Any]:
    """Trains on live answers, on stored ones and on none, in turns."""
    import programs

    setups = {side: set_up(options, data, side) for side in SIDES}
    begin = time.perf_counter()
    targets = write_targets(setups["stored"], folder, by_record=options.by_record)
    seconds = time.perf_counter() - begin
    trainings = {
        side: programs.Training(
            setup, setup.stages[0], targets=targets if side == "stored" else None
        )
        for side, setup in setups.items()
    }
    rates = measuring.take_turns(
        {side: t.side(steps=options.steps) for side, t in trainings.items()},
        rounds=options.rounds,
    )
    for training in trainings.values():
        training.close()
    flops = {side: t.programs.flops_per_step for side, t in trainings.items()}
    manifest = targets.files.manifest
    written = manifest.records * manifest.views
    counted = flops["live"] / flops["stored"]
    ratio = measuring.ratio_of(rates["stored"], rates["live"])
    share = round(ratio / counted, 4)
    return {
        "benchmark": "stored_targets",
        "ratio": ratio,
        "counted": round(counted, 4),
        "share": share,
        "target": TARGET,
        "reached": share >= TARGET,
        "of_alone": measuring.ratio_of(rates["stored"], rates["alone"]),
        "images_per_second": {k: measuring.spread(v) for k, v in rates.items()},
        "gflop_per_step": {side: round(f / 1e9, 6) for side, f in flops.items()},
        "labelling": {
            "answers": written,
            "bytes_per_answer": manifest.record_bytes,
            "mebibytes": round(manifest.nbytes / 2**20, 3),
            "seconds": round(seconds, 2),
        },
    }


def work(options: Options) -> dict[str, Any]:
    """Measures on synthetic data."""
    with tempfile.TemporaryDirectory() as folder:
        data = synthetic.write_cifar(
            Path(folder, "synthetic.npz"), train=options.records, test=64
        )
        result = compare(options, data, Path(folder, "run"))
    return {**result, **options._asdict(), "data": synthetic.CIFAR}


def measure(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Measures what the command line asks for."""
    return measuring.report(parse(arguments), work)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints one JSON line, returns the exit status."""
    return measuring.end(measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
