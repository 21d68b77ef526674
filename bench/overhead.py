"""What a step of every method costs beside a step of plain KD.

    python bench/overhead.py
    python bench/overhead.py --device=gpu --precision=bfloat16 \
        --pair=resnet32x4-resnet8x4 --compile-workers=8 --out=runs/overhead.json

prints one JSON line and, on standard error, a Markdown table. Every method has its
recipe of configs/shared.py, through configs/cifar100.py, and runs on synthetic data in
the shape of CIFAR-100 that live on the device. KD and the method take turns, round by
round; `ratio` is the time of the method's step over that of KD's. `counted` is the same
ratio of the arithmetic that the two programs ask for. Networks are not trained: what a
step computes does not depend on it. Of methods in two phases the first one is measured,
which has the method in it. Methods that refuse the pair, diverge or need more memory
than there is are listed with the reason.

`--out` is written after every method, and a method that it holds already is not
measured again.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import synthetic
from jax.errors import JaxRuntimeError
from measuring import Mistake

# Larger than the number of negatives that CRD draws.
RECORDS = 20_000
PAIRS = {"cpu": "resnet14-resnet8", "gpu": "resnet32x4-resnet8x4"}
STEPS = {"cpu": 3, "gpu": 40}


class Options(NamedTuple):
    """What is measured."""

    methods: tuple[str, ...]
    pair: str
    device: str
    precision: str
    batch_size: int
    records: int
    steps: int
    steps_per_call: int
    rounds: int
    seconds: float
    compile_workers: int
    out: Path | None


def parse(arguments: Sequence[str] | None) -> Options:
    """Reads and checks the command line."""
    parser = measuring.Parser("overhead.py", __doc__)
    parser.add_argument("--methods", default="all", help="all, or names with commas")
    parser.add_argument("--pair", help="TEACHER-STUDENT")
    parser.add_argument("--device", choices=measuring.DEVICES, default="cpu")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--steps", type=int, help="per round")
    parser.add_argument("--steps-per-call", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="begin no method after so many"
    )
    parser.add_argument(
        "--compile-workers", type=int, default=1, help="methods compiled at once"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write or to add to")
    values = vars(parser.parse_args(arguments))
    device = values["device"]
    values["pair"] = values["pair"] or PAIRS[device]
    values["steps"] = STEPS[device] if values["steps"] is None else values["steps"]
    known = known_methods()
    methods = values["methods"]
    names = known if methods == "all" else methods.split(",")
    for name in names:
        if name not in known:
            raise Mistake(f"no method {name!r}; known: {', '.join(known)}")
    # KD is what the others are set against.
    values["methods"] = tuple(name for name in names if name != "kd")
    options = Options(**values)
    measuring.at_least(
        options,
        1,
        *("batch_size", "records", "steps", "steps_per_call", "rounds"),
        "compile_workers",
    )
    return options


def known_methods() -> list[str]:
    """The methods that have a recipe."""
    import programs

    return list(programs.recipes().RECIPES)


def make_training(options: Options, method: str, data: Path) -> Any:
    """The stage that has the method in it, compiled.

    Raises:
      Mistake: the method does not fit the pair or the data.
    """
    import programs

    config = programs.configured(
        f"cifar100.py:{options.pair}-{method}-{options.batch_size}",
        {
            **synthetic.reading(data),
            "precision": options.precision,
            "train.resident": True,
            "train.steps_per_call": options.steps_per_call,
        },
    )
    setup = programs.set_up(config)
    two_phases = method in programs.recipes().TWO_PHASES
    name = "student_first" if two_phases else "student"
    stage = next(stage for stage in setup.stages if stage.name == name)
    training = programs.Training(setup, stage)
    training.compile()
    return training


def try_training(options: Options, method: str, data: Path) -> Any:
    """A training, or the error that says why there is none."""
    try:
        return make_training(options, method, data)
    except (Mistake, JaxRuntimeError) as error:
        return error


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0]


def compare(options: Options, results: dict[str, Any], data: Path) -> None:
    """Adds the methods that `results` lacks, one after the other.

    A method that cannot be measured is listed among the refused, and the others go on.

    Raises:
      Mistake: KD itself does not fit.
      measuring.Diverged: KD itself diverged.
    """
    begin = time.monotonic()
    wanted = [
        method
        for method in options.methods
        if method not in results["methods"] and method not in results["refused"]
    ]
    kd = make_training(options, "kd", data)
    for first in range(0, len(wanted), options.compile_workers):
        if time.monotonic() - begin > options.seconds:
            break
        group = wanted[first : first + options.compile_workers]
        print(f"{', '.join(group)} ...", file=sys.stderr, flush=True)
        with ThreadPoolExecutor(options.compile_workers) as workers:
            found = workers.map(lambda m: try_training(options, m, data), group)
        for method, training in zip(group, found, strict=True):
            if isinstance(training, Exception):
                results["refused"][method] = reason(training)
                continue
            try:
                results["methods"][method] = beside_kd(options, method, training, kd)
            except (measuring.Diverged, JaxRuntimeError) as error:
                if getattr(error, "side", method) == "kd":
                    raise
                results["refused"][method] = reason(error)
            if method in results["refused"]:
                # It may have failed in a turn of KD, whose state is gone then.
                del training
                kd.close()
                kd = make_training(options, "kd", data)
            write(options.out, results)
    kd.close()
    write(options.out, results)


def beside_kd(options: Options, method: str, training: Any, kd: Any) -> dict[str, Any]:
    """What is told of a method; its training is closed then."""
    try:
        sides = {"kd": kd, method: training}
        rates = measuring.take_turns(
            {name: side.side(steps=options.steps) for name, side in sides.items()},
            rounds=options.rounds,
        )
        return row(options, rates, kd, training)
    finally:
        training.close()


def row(
    options: Options, rates: Mapping[str, Sequence[float]], kd: Any, training: Any
) -> dict[str, Any]:
    """What is told of a method, from the images per second of KD and of its own."""
    kd_rates, own = rates.values()
    kd_flops = kd.programs.flops_per_step
    own_flops = training.programs.flops_per_step
    counted = None
    if kd_flops and own_flops:
        counted = round(own_flops / kd_flops, 4)
    rounds = [a / b for a, b in zip(kd_rates, own, strict=True)]
    return {
        "ratio": measuring.ratio_of(kd_rates, own),
        "low": round(min(rounds), 4),
        "high": round(max(rounds), 4),
        "counted": counted,
        "milliseconds": round(1e3 * options.batch_size / statistics.median(own), 3),
        "kd_milliseconds": round(
            1e3 * options.batch_size / statistics.median(kd_rates), 3
        ),
    }


def read(options: Options) -> dict[str, Any]:
    """The results so far: those of a file made with the same settings, or none.

    Raises:
      Mistake: the file was made with other settings.
    """
    settings = {
        key: getattr(options, key)
        for key in ("pair", "device", "precision", "batch_size", "records")
    }
    settings["steps_per_call"] = options.steps_per_call
    if options.out is not None and options.out.exists():
        results = json.loads(options.out.read_text())
        if results["settings"] != settings:
            raise Mistake(
                f"{options.out} was made with other settings; give another --out"
            )
        return results
    return {
        "benchmark": "method_overhead",
        "settings": settings,
        "methods": {},
        "refused": {},
    }


def write(out: Path | None, results: Mapping[str, Any]) -> None:
    """Writes the results so far, if there is a file for them."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(measuring.finite(results), indent=1) + "\n")


def markdown(results: Mapping[str, Any]) -> str:
    """The table, the cheapest method first."""
    rows = sorted(results["methods"].items(), key=lambda item: item[1]["ratio"])
    lines = [
        "| method | step against KD | rounds | arithmetic against KD |",
        "|---|---:|---:|---:|",
    ]
    for name, values in rows:
        counted = values["counted"]
        lines.append(
            f"| `{name}` | {values['ratio']:.2f} | {values['low']:.2f} to "
            f"{values['high']:.2f} | {'' if counted is None else f'{counted:.2f}'} |"
        )
    return "\n".join(lines)


def measure(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Measures what the command line asks for."""
    options = parse(arguments)
    load = measuring.load()
    results = read(options)
    measuring.use_device(options.device)
    results.update(data=synthetic.CIFAR, **measuring.conditions(options.device, load))
    with tempfile.TemporaryDirectory() as folder:
        data = synthetic.write_cifar(
            Path(folder, "synthetic.npz"), train=options.records, test=256
        )
        compare(options, results, data)
    print(markdown(results), file=sys.stderr)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints one JSON line, returns the exit status."""
    return measuring.end(measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
