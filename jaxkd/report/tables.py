"""Result tables: one row per network, one column per metric, then the costs.

`results_table` is what a run prints at its end, `results_markdown` the same for a
document, and `spread_markdown` the mean and standard deviation over seeds. All are made
from a `Table`, which the report page renders as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxkd.metrics.segmentation import nan_mean
from jaxkd.report.naming import MISSING, Better, Metric, describe
from jaxkd.report.run import number

_UNDEFINED = {
    "hd95_undefined": "HD95 and ASSD are undefined where prediction or truth is empty",
    "ravd_undefined": "RAVD is undefined for a case without truth",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One printed value; `best` if no other row is better."""

    text: str
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: heading, what is good in it, and what it means."""

    heading: str
    better: Better | None = None
    meaning: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
      columns: without the first, which holds the rows' names.
      rows: name and cells of every row.
      notes: sentences to print below.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    notes: tuple[str, ...] = ()

    @property
    def has_best(self) -> bool:
        """Whether any value is marked."""
        return any(cell.best for _, cells in self.rows for cell in cells)


def build_table(summary: Mapping[str, Any]) -> Table:
    """The results of one run.

    Args:
      summary: the content of `summary.json` (null or NaN where undefined).

    Returns:
      Networks in rows; metrics, parameters and multiply-adds in columns. Of a run of
      several seeds, what `build_spread_table` makes of them.
    """
    if len(summary.get("seeds", ())) > 1:
        return build_spread_table(split_seeds(summary))
    results = summary.get("results", {})
    columns = []
    for key in _metric_keys(results):
        metric = describe(key)
        values = [number(result.get(key)) for result in results.values()]
        best = _best(metric, values)
        cells = [Cell(metric.text(v), b) for v, b in zip(values, best, strict=True)]
        columns.append((_column(metric), cells))
    columns += _cost_columns(summary.get("costs", {}), list(results))
    return _assemble(list(results), columns, _undefined_notes([results]))


def split_seeds(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The summary of each seed of a run that trained several together."""
    by_seed = summary.get("by_seed", {})
    return [
        {
            **summary,
            "seed": seed,
            "seeds": [seed],
            "results": {name: results[i] for name, results in by_seed.items()},
        }
        for i, seed in enumerate(summary["seeds"])
    ]


def build_spread_table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """Mean ± standard deviation (ddof=1) over runs that differ in their seed only.

    Args:
      summaries: contents of `summary.json`, one or more.

    Returns:
      Networks in rows; the columns of the first run's table. A mean over fewer runs
      than there are says so.

    Raises:
      ValueError: no summaries.
    """
    if not summaries:
        raise ValueError("a table of spreads needs at least one summary")
    first = summaries[0]
    networks = list(first.get("results", {}))
    columns, partial = [], False
    for key in _metric_keys(first.get("results", {})):
        metric = describe(key)
        values = [
            [number(s.get("results", {}).get(name, {}).get(key)) for s in summaries]
            for name in networks
        ]
        partial |= any(0 < sum(map(math.isfinite, row)) < len(row) for row in values)
        best = _best(metric, [nan_mean(row) for row in values])
        cells = [Cell(metric.spread(r), b) for r, b in zip(values, best, strict=True)]
        columns.append((_column(metric), cells))
    columns += _cost_columns(first.get("costs", {}), networks)
    seeds = ", ".join(str(s.get("seed", "?")) for s in summaries)
    count = len(summaries)
    notes = [f"Mean ± standard deviation (ddof=1) over {count} runs, seeds {seeds}."]
    if partial:
        notes.append(
            f"(n of {count}): undefined in the other runs, which the mean leaves out."
        )
    notes += _undefined_notes([s.get("results", {}) for s in summaries])
    return _assemble(networks, columns, notes)


def results_table(summary: Mapping[str, Any]) -> str:
    """The results of a run as plain text, for a terminal.

    Args:
      summary: the content of `summary.json`.

    Returns:
      Lines without a final newline; `*` marks the best value of a column.
    """
    table = build_table(summary)
    if not table.rows:
        return "no network has been evaluated yet"
    header = ["network", *(column.heading for column in table.columns)]
    body = [
        [name, *(cell.text + ("*" if cell.best else " ") for cell in cells)]
        for name, cells in table.rows
    ]
    # Headings end where the digits end, one place before the column of stars.
    header = [header[0], *(text + " " for text in header[1:])]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + " " for width in widths[1:])]
    lines = [
        " ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [header, rule, *body]
    ]
    notes = [*(["* best of its column."] if table.has_best else []), *table.notes]
    return "\n".join([*lines, *notes])


def results_markdown(summary: Mapping[str, Any]) -> str:
    """The results of a run as a Markdown table; the best values are bold.

    Args:
      summary: the content of `summary.json`.

    Returns:
      Lines without a final newline.
    """
    return _markdown(build_table(summary))


def spread_markdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Mean ± standard deviation over seeds as a Markdown table.

    Args:
      summaries: contents of `summary.json` of runs that differ in their seed only.

    Returns:
      Lines without a final newline; the best means are bold.

    Raises:
      ValueError: no summaries.
    """
    return _markdown(build_spread_table(summaries))


def _markdown(table: Table) -> str:
    if not table.rows:
        return "No network has been evaluated yet."

    def line(texts: Sequence[str]) -> str:
        return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in texts)} |"

    lines = [
        line(["network", *(column.heading for column in table.columns)]),
        "|".join(["", "---", *("---:" for _ in table.columns), ""]),
    ]
    for name, cells in table.rows:
        texts = [f"**{cell.text}**" if cell.best else cell.text for cell in cells]
        lines.append(line([name, *texts]))
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)])


def _metric_keys(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Metrics of any network, in the order they come; counts of dropped ones left out.

    Sorted so that scores per class follow the summary numbers.
    """
    keys = dict.fromkeys(key for result in results.values() for key in result)
    shown = [key for key in keys if not key.endswith("_undefined")]
    return sorted(shown, key=lambda key: "/" in key)


def _assemble(
    networks: Sequence[str],
    columns: Sequence[tuple[Column, Sequence[Cell]]],
    notes: Sequence[str],
) -> Table:
    """A table from its columns."""
    rows = tuple(
        (name, tuple(cells[i] for _, cells in columns))
        for i, name in enumerate(networks)
    )
    return Table(tuple(column for column, _ in columns), rows, tuple(notes))


def _column(metric: Metric) -> Column:
    return Column(metric.heading, metric.better, metric.meaning)


def _best(metric: Metric, values: Sequence[float]) -> list[bool]:
    """Which values are the best: all that print like it, if there is a choice."""
    texts = [metric.text(value) for value in values]
    defined = [v for v in values if math.isfinite(v)]
    none = [False] * len(texts)
    if metric.better is None or len(defined) < 2:
        return none
    choose = {
        "higher": lambda: max(defined),
        "lower": lambda: min(defined),
        "zero": lambda: min(defined, key=abs),
    }[metric.better]
    best = metric.text(choose())
    if all(text == best for text in texts):
        return none
    return [text == best for text in texts]


def _cost_columns(
    costs: Mapping[str, Mapping[str, Any]], networks: Sequence[str]
) -> list[tuple[Column, list[Cell]]]:
    """Parameters in millions; multiply-adds in millions or billions."""
    if not costs:
        return []
    params = [number(costs.get(name, {}).get("params")) for name in networks]
    macs = [number(costs.get(name, {}).get("macs")) for name in networks]
    largest = max((m for m in macs if math.isfinite(m)), default=0.0)
    letter, unit = ("G", 1e9) if largest >= 1e9 else ("M", 1e6)
    columns = [
        (
            Column("params (M)", None, "trained numbers of the network, in millions"),
            _cost_cells([value / 1e6 for value in params]),
        ),
        (
            Column(
                f"MACs ({letter})",
                None,
                "multiply-adds of one forward pass of one image, counted, in "
                + ("billions" if letter == "G" else "millions"),
            ),
            _cost_cells([value / unit for value in macs]),
        ),
    ]
    kept = [number(costs.get(name, {}).get("density")) for name in networks]
    if any(math.isfinite(value) for value in kept):
        title = (
            "share of the weights that take part, in per cent; a dense machine "
            "computes the others as well"
        )
        cells = [
            Cell(f"{100 * value:.1f}" if math.isfinite(value) else "100")
            for value in kept
        ]
        columns.append((Column("density (%)", None, title), cells))
    sent = [number(costs.get(name, {}).get("bytes_sent")) for name in networks]
    if any(math.isfinite(value) for value in sent):
        title = "bytes that a network cut in two sends between its parts for one image"
        cells = [
            Cell(f"{value:.0f}" if math.isfinite(value) else MISSING) for value in sent
        ]
        columns.append((Column("sent (B)", None, title), cells))
    return columns


def _cost_cells(values: Sequence[float]) -> list[Cell]:
    """Costs with so many decimals that the smallest keeps at least two digits.

    >>> [cell.text for cell in _cost_cells([36.628546, 0.0781])]
    ['36.629', '0.078']
    """
    smallest = min((v for v in values if v > 0), default=1.0)
    digits = 2 if smallest >= 1 else 3 if smallest >= 0.01 else 4
    return [
        Cell(f"{value:.{digits}f}" if math.isfinite(value) else MISSING)
        for value in values
    ]


def _undefined_notes(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """One sentence per metric that was undefined somewhere.

    Args:
      runs: the results of each run; their counts are added up.
    """
    keys = dict.fromkeys(
        key
        for results in runs
        for result in results.values()
        for key in result
        if key.endswith("_undefined")
    )
    notes = []
    for key in keys:
        counts: dict[str, float] = {}
        for results in runs:
            for name, result in results.items():
                value = number(result.get(key))
                if value > 0:
                    counts[name] = counts.get(name, 0) + value
        some = [f"{name} {int(n)}" for name, n in counts.items()]
        if some:
            reason = _UNDEFINED.get(key, f"{key.removesuffix('_undefined')}: undefined")
            means = "mean" if len(runs) == 1 else "means of all runs together"
            notes.append(f"{reason}; left out of the {means}: {', '.join(some)}.")
    return notes
