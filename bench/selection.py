"""What selecting records brings, and what it costs: accuracy over seeds, step times.

    python bench/selection.py
    python bench/selection.py --data=npz --path=cifar100.npz --records=5000 --width=1 \
        --epochs=10 --out=docs/selection.json

prints one JSON line and, on standard error, a Markdown table. Every trial trains the
same network from the same initial weights for the same number of steps, with several
seeds in one program; `training_macs` is what its steps ask for. `proxy (equal cost)`
makes as many more steps as its cheaper steps allow. Hard mini-batches see fixed batches
without augmentation, as published, and so does `all, fixed`, which is what they are to
be compared with.

`overhead` is the time of a step with a selection over that of the same step without:
sides take turns within one process, and medians over rounds are compared. Data of
--data=digits are real and small: they show that it runs, and little else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring
import trials

SHARES = (0.2, 0.5, 0.8)
PROXY_WIDTH = 0.5


def parse(arguments: Sequence[str] | None) -> Any:
    """Reads and checks the command line."""
    parser = measuring.Parser("selection.py", __doc__)
    trials.add_options(parser)
    parser.add_argument(
        "--trials", help="names, separated by semicolons; all by default"
    )
    parser.add_argument("--rounds", type=int, default=7, help="of the step times")
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--out", type=Path, help="writes the results there as well")
    options = parser.parse_args(arguments)
    measuring.at_least(
        options, 1, "records", "epochs", "batch_size", "rounds", "steps"
    )  # fmt: skip
    return options


def all_trials(task: trials.Task) -> dict[str, dict[str, Any]]:
    """The trials by name."""

    def selecting(name: str, **options: Any) -> dict[str, Any]:
        return {"stage": {"select": {"name": name, **options}}}

    early = {"epochs": max(1, task.epochs // 5)}
    proxy = {
        "networks": {"proxy": {"width_factor": PROXY_WIDTH * task.width}},
        "stages": {"proxy": {}},
    }
    half = selecting("proxy", keep=0.5, network="proxy")
    return {
        "all": {},
        "all, fixed": {**selecting("hard_batches", delta=1.0), "augment": False},
        **{
            f"hard batches, delta {share}": {
                **selecting("hard_batches", delta=share, shuffle=True),
                "augment": False,
            }
            for share in SHARES
        },
        "ohem, keep 0.5": selecting("ohem", keep=0.5),
        "selective backprop": selecting("selective_backprop", beta=1.0),
        "loss rank": selecting("loss_rank", pressure=10.0),
        "proxy, keep 0.5": {**proxy, **half},
        "proxy, keep 0.5 (equal cost)": {
            **proxy,
            "stage": {**half["stage"], "epochs": round(task.epochs * EQUAL_COST)},
        },
        "prune, keep 0.5": {
            "networks": {"early": {}},
            "stages": {"early": early},
            **selecting("prune", keep=0.5, raters=("early",)),
        },
    }


# A step on half of the records, whose proxy has a quarter of the cost and runs forward
# alone: (3 + 0) / (3 * 0.5 + 0.25).
EQUAL_COST = 3 / (3 * 0.5 + PROXY_WIDTH**2)


# Trials whose step is timed; the first is what the others are set against.
TIMED = {
    "all": {},
    "hard batches": {"stage": {"select": {"name": "hard_batches", "delta": 0.5}}},
    "ohem": {"stage": {"select": {"name": "ohem", "keep": 0.5}}},
    "loss rank": {"stage": {"select": {"name": "loss_rank"}}},
}


def measure(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Measures what the command line asks for."""
    options = parse(arguments)
    task = trials.task_of(options)
    wanted = trials.choose(all_trials(task), options.trials)

    def work(options: Any) -> dict[str, Any]:
        steps = trials.overhead(task, TIMED, options)
        results = trials.run_all(task, wanted)
        columns = ("data_used", "records_selected")
        print(trials.table(results, columns), file=sys.stderr)
        return {
            "benchmark": "selection",
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
