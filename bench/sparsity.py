"""What sparse layers bring, and what masks cost: accuracy over seeds, step times.

    python bench/sparsity.py
    python bench/sparsity.py --data=npz --path=cifar100.npz --records=5000 --width=1 \
        --epochs=10 --out=docs/sparsity.json

prints one JSON line and, on standard error, a Markdown table. Every trial trains for
the same number of steps with several seeds in one program. Trials of *equal steps* mask
the dense network, so that an ideal machine would do a fraction of its work
(`effective_macs` of one image); those of *equal FLOPs* are Sparse-IFT's larger networks
with the effective work of the dense one. Masks are simulated: a dense machine
multiplies by the zeros as well, and `macs` says what it really does.

`overhead` is the time of a step with masks over that of the same step without: sides
take turns within one process, and medians over rounds are compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring
import trials
from measuring import Mistake

UPDATES = ("static", "set", "rigl", "granet", "gmp")
FAMILIES = ("wide", "parallel", "factorized", "doped")


def parse(arguments: Sequence[str] | None) -> Any:
    """Reads and checks the command line."""
    parser = measuring.Parser("sparsity.py", __doc__)
    trials.add_options(parser)
    parser.add_argument("--sparsity", type=float, default=0.9, help="of the masks")
    parser.add_argument(
        "--iso-sparsity", type=float, default=0.75, help="of Sparse-IFT's layers"
    )
    parser.add_argument(
        "--every", type=int, default=20, help="steps between changes of the masks"
    )
    parser.add_argument("--trials", help="names, separated by semicolons")
    parser.add_argument("--rounds", type=int, default=7, help="of the step times")
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--out", type=Path, help="writes the results there as well")
    options = parser.parse_args(arguments)
    measuring.at_least(
        options, 1, "records", "epochs", "batch_size", "every", "rounds", "steps"
    )
    for name in ("sparsity", "iso_sparsity"):
        if not 0 < getattr(options, name) < 1:
            raise Mistake(
                f"--{name.replace('_', '-')} must be above 0 and below 1, got "
                f"{getattr(options, name)}"
            )
    return options


def all_trials(options: Any) -> dict[str, dict[str, Any]]:
    """The trials by name."""

    def compressed(**parts: Any) -> dict[str, Any]:
        return {"network": {"compress": parts}}

    masks = {
        f"{name}, {options.sparsity:g}": compressed(
            **{name: _options(name, options.sparsity, options.every)}
        )
        for name in UPDATES
    }
    larger = {
        f"{family}, {options.iso_sparsity:g}": compressed(
            sparse_ift={
                "family": family,
                "sparsity": options.iso_sparsity,
                "updates": "rigl",
                "schedule": {"frequency": options.every},
            }
        )
        for family in FAMILIES
    }
    thin = {"network": {"width_factor": options.width * (1 - options.sparsity) ** 0.5}}
    return {"dense": {}, "dense, narrow": thin, **masks, **larger}


def _options(name: str, sparsity: float, every: int) -> dict[str, Any]:
    if name == "static":
        return {"sparsity": sparsity}
    return {"sparsity": sparsity, "frequency": every}


def timed(options: Any) -> dict[str, dict[str, Any]]:
    """Trials whose step is timed; the first is what the others are set against."""
    masks = {
        name: {"network": {"compress": {name: _options(name, options.sparsity, 100)}}}
        for name in ("static", "rigl")
    }
    return {"dense": {}, **masks}


def measure(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Measures what the command line asks for."""
    options = parse(arguments)
    task = trials.task_of(options)
    wanted = trials.choose(all_trials(options), options.trials)

    def work(options: Any) -> dict[str, Any]:
        steps = trials.overhead(task, timed(options), options)
        results = trials.run_all(task, wanted)
        print(trials.table(results, ("density",)), file=sys.stderr)
        return {
            "benchmark": "sparsity",
            "task": task._asdict(),
            "overhead": steps,
            "trials": results,
        }

    result = measuring.report(options, work)
    if options.out is not None:
        text = json.dumps(measuring.finite(result), indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints one JSON line, returns the exit status."""
    return measuring.end(measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
