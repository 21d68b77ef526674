"""The tables of docs/methods/hlfd.md: HLFD, its variants and the baselines of its code.

    python bench/hlfd_table.py --seeds=3 --workdir=runs/hlfd_table

Seed 0 trains a student with every method of `configs/hlfd.py:table`; the other seeds
train the student alone and with HLFD (resampled and learned projections). Every student
of a seed has the same teacher, initial weights, batches and augmentation. Runs that are
finished already are not repeated. Prints Markdown.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from jaxkd.report import results_markdown, spread_markdown

CONFIG = "configs/hlfd.py:table"
EVERY_SEED = ("teacher", "student_alone", "hlfd", "hlfd_learned")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=Path, default=Path("runs/hlfd_table"))
    parser.add_argument("rest", nargs="*", help="--config.key=value, after --")
    options = parser.parse_args(arguments)
    summaries = []
    for seed in range(options.seeds):
        workdir = options.workdir / f"seed{seed}"
        command = [
            *(sys.executable, "-m", "jaxkd.main", f"--config={CONFIG}"),
            *(f"--workdir={workdir}", f"--config.seed={seed}", *options.rest),
        ]
        if seed:
            command.append(f"--config.run={EVERY_SEED!r}")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summaries.append(json.loads((workdir / "summary.json").read_text()))
    print(tables(summaries))
    return 0


def tables(summaries: list[dict]) -> str:
    """Mean ± deviation of the rows that every seed has, then all rows of seed 0."""
    common = [
        {**s, "results": {name: s["results"][name] for name in EVERY_SEED}}
        for s in summaries
    ]
    first = summaries[0]
    seconds = ", ".join(f"{s['learner']} {s['seconds']:.0f}" for s in first["stages"])
    return "\n\n".join(
        [
            f"{len(summaries)} seeds:",
            spread_markdown(common),
            "Seed 0, every method:",
            results_markdown(first),
            f"Seconds per stage of seed 0: {seconds}. Device: {first['device']}.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
