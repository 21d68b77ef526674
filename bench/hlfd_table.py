"""The table of docs/methods/hlfd.md: HLFD, its variants and the baselines of its code.

    python bench/hlfd_table.py --seeds=3 --workdir=runs/hlfd_table

Seed 0 trains a student with every method of `configs/hlfd.py:table`; the other seeds
train the student alone and with HLFD (resampled and learned projections). Every student
of a seed has the same teacher, initial weights, batches and augmentation. Runs that are
there already are not repeated. Prints a Markdown table and writes `table.json`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

CONFIG = "configs/hlfd.py:table"
EVERY_SEED = ("teacher", "student_alone", "hlfd", "hlfd_learned")
COLUMNS = {
    "dice": ("Dice (%)", 100),
    "iou": ("IoU (%)", 100),
    "hd95": ("HD95 (px)", 1),
    "assd": ("ASSD (px)", 1),
}


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
    table = aggregate(summaries)
    (options.workdir / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    print(markdown(table))
    return 0


def aggregate(summaries: list[dict]) -> dict:
    """Mean and standard deviation per network and metric over the runs that have it."""
    rows: dict[str, dict] = {}
    for summary in summaries:
        seconds = {s["learner"]: s["seconds"] for s in summary["stages"]}
        for network, metrics in summary["results"].items():
            row = rows.setdefault(network, {"seconds": []})
            row["seconds"].append(seconds[network])
            for name in COLUMNS:
                if metrics[name] is not None:
                    row.setdefault(name, []).append(metrics[name])
    return {
        "command": summaries[0]["command"],
        "device": summaries[0]["device"],
        "data": summaries[0]["data"],
        "costs": summaries[0]["costs"],
        "rows": {
            network: {name: spread(values) for name, values in row.items()}
            for network, row in rows.items()
        },
    }


def spread(values: list[float]) -> dict:
    """Mean, sample standard deviation (None for one value) and number."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "count": len(values),
    }


def markdown(table: dict) -> str:
    """The table as Markdown: mean ± standard deviation over seeds."""
    titles = [title for title, _ in COLUMNS.values()]
    lines = [
        "| network | seeds | " + " | ".join(titles) + " | seconds |",
        "|---|---|" + "---|" * (len(titles) + 1),
    ]
    for network, row in table["rows"].items():
        cells = [cell(row.get(name), scale) for name, (_, scale) in COLUMNS.items()]
        cells.append(f"{row['seconds']['mean']:.0f}")
        lines.append(
            f"| {network} | {row['seconds']['count']} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def cell(value: dict | None, scale: float) -> str:
    """`mean ± std`, or the one value there is, or a dash."""
    if value is None:
        return "–"
    mean = f"{scale * value['mean']:.2f}"
    return mean if value["std"] is None else f"{mean} ± {scale * value['std']:.2f}"


if __name__ == "__main__":
    sys.exit(main())
