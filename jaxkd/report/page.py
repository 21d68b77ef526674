"""One HTML page per run, or for several runs: results, pictures, curves, environment.

The page is one file without scripts and without external resources; it can be mailed,
archived and opened from a disk. Every string of a run (class names, notes, the command)
is escaped by the template; only pictures that this package draws are inserted as they
are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

import jaxkd
from jaxkd.report import galleries, stages, story, tables
from jaxkd.report.curves import SERIES_COLOURS
from jaxkd.report.run import ReportError, Run, read_run

_TEMPLATES = Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunView:
    """What the page says of one run, in the order of the page.

    Attributes:
      key: prefix of ids, unique on the page.
      name: the run's name.
      status: `"finished"` or why not.
      lead: the outcome in a sentence.
      tiles: large numbers: what, value, explanation.
      table: results and costs.
      notes: what the reader should know.
      overview: the main metric over the steps, and against the costs.
      goal: the network by whose predictions pictures were chosen.
      stored: how many predictions the run stored.
      slices: segmented slices.
      outlined: names and colours of the classes outlined in them, if several.
      cards: classified images.
      confusions: confusion matrices.
      class_names: of the data.
      stages: the training.
      environment: (name, value) pairs.
      command: the command line, if known.
      config: the resolved config as JSON, if known.
    """

    key: str
    name: str
    status: str
    lead: str
    tiles: Sequence[tuple[str, str, str]]
    table: tables.Table
    notes: Sequence[str]
    overview: Sequence[stages.Chart]
    goal: str
    stored: int
    slices: Sequence[galleries.SliceRow]
    outlined: Sequence[tuple[str, int]]
    cards: Sequence[galleries.ImageCard]
    confusions: Sequence[galleries.Confusion]
    class_names: Sequence[str]
    stages: Sequence[stages.StageView]
    environment: Sequence[tuple[str, str]]
    command: str
    config: str


def write_report(workdirs: Sequence[Path], output: Path) -> Path:
    """Writes the page of one or more runs.

    Runs that are not finished get a page of what is there. Several runs get a common
    table first, and those that differ in their seed only are averaged.

    Args:
      workdirs: the folders of the runs, at least one.
      output: the file to write; its folder is made if missing.

    Returns:
      `output`.

    Raises:
      ReportError: no workdirs, a folder that holds no run, or a damaged file; the text
        is one line.
    """
    if not workdirs:
        raise ReportError("a report needs at least one workdir")
    runs = _with_unique_names([read_run(Path(workdir)) for workdir in workdirs])
    several = len(runs) > 1
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        title=f"{len(runs)} runs" if several else runs[0].name,
        views=[_view(run, f"run{i}", alone=not several) for i, run in enumerate(runs)],
        comparisons=_comparisons(runs) if several else [],
        spreads=_spreads(runs),
        version=jaxkd.__version__,
        series_colours=SERIES_COLOURS,
        # The package's own file, without any text of a run.
        style=markupsafe.Markup((_TEMPLATES / "report.css").read_text("utf-8")),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def _view(run: Run, key: str, *, alone: bool) -> RunView:
    """Everything about a run; fewer pictures if it is one of several."""
    predicted = galleries.predicted_networks(run)
    task = run.task if predicted else ""
    slices = (
        galleries.slice_rows(run, key=key, per_group=3 if alone else 1)
        if task == "segmentation"
        else []
    )
    classes = {c for row in slices for cell in row.cells for _, c in cell.outlines}
    return RunView(
        key=key,
        name=run.name,
        status=run.status,
        lead=story.lead(run),
        tiles=list(story.tiles(run)),
        table=tables.build_table(run.summary),
        notes=[*run.notes, *_caution(run)],
        overview=[
            chart
            for chart in (
                stages.overview(run),
                stages.trade_off(run),
                stages.size_trade_off(run),
            )
            if chart is not None
        ],
        goal=predicted[-1] if predicted else "",
        stored=len(run.predictions.get("truth", ())),
        slices=slices,
        outlined=[(galleries.class_name(run, c), c) for c in sorted(classes)]
        if len(classes) > 1
        else [],
        cards=galleries.image_cards(run, per_group=8 if alone else 4)
        if task == "classification"
        else [],
        confusions=galleries.confusions(run) if task == "classification" else [],
        class_names=[str(name) for name in run.summary.get("class_names", [])],
        stages=stages.stage_views(run),
        environment=list(_environment(run)),
        command=str(run.summary.get("command", "")),
        config=json.dumps(run.config["config"], indent=2)
        if "config" in run.config
        else "",
    )


def _caution(run: Run) -> Iterable[str]:
    """What a single run cannot tell."""
    if len(run.summary.get("seeds", ())) > 1:
        return
    if len(run.summary.get("results", {})) > 1:
        yield (
            f"One run with seed {run.summary.get('seed', '?')}: small differences may "
            "be chance. Repeat it with other seeds before relying on them."
        )


def _environment(run: Run) -> Iterable[tuple[str, str]]:
    """Where and on what the run ran."""
    seeds = run.summary.get("seeds", ())
    for name in ("device", "seed", "task"):
        if name == "seed" and len(seeds) > 1:
            yield "seeds", ", ".join(map(str, seeds))
        elif run.summary.get(name) is not None:
            yield name, str(run.summary[name])
    for name, value in run.summary.get("data", {}).items():
        yield f"data: {str(name).replace('_', ' ')}", str(value)
    if run.config.get("git_revision"):
        yield "git revision", str(run.config["git_revision"])
    versions = run.summary.get("versions") or run.config.get("versions", {})
    for name, value in versions.items():
        yield str(name), str(value)


def _with_unique_names(runs: Sequence[Run]) -> list[Run]:
    """The runs; those whose folders have the same name are numbered."""
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=f"{run.name} ({names[: i + 1].count(run.name)})")
        if names.count(run.name) > 1
        else run
        for i, run in enumerate(runs)
    ]


def _comparisons(runs: Sequence[Run]) -> list[tables.Table]:
    """All networks of all runs, in one table per task."""
    found = []
    for task in dict.fromkeys(run.task for run in runs):
        merged: dict[str, dict[str, Any]] = {"results": {}, "costs": {}}
        for part, rows in merged.items():
            for run in (run for run in runs if run.task == task):
                for name, values in run.summary.get(part, {}).items():
                    rows[f"{run.name} · {name}"] = values
        found.append(tables.build_table(merged))
    return [table for table in found if table.rows]


def _spreads(runs: Sequence[Run]) -> list[tuple[str, tables.Table]]:
    """Tables over seeds, for every set of runs whose configs differ in it alone."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        config = run.config.get("config")
        if isinstance(config, Mapping) and run.summary.get("results"):
            rest = {key: value for key, value in config.items() if key != "seed"}
            groups.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    return [
        (
            ", ".join(run.name for run in group),
            tables.build_spread_table([run.summary for run in group]),
        )
        for group in groups.values()
        if len({run.summary.get("seed") for run in group}) > 1
    ]
