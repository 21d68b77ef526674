"""What the page says of training: stages, their terms and their curves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import markupsafe

from jaxkd.report import naming
from jaxkd.report.curves import Series, line_chart, point_chart
from jaxkd.report.run import Record, Run, number

# Keys of an evaluation record that are no metrics.
_PLACE = ("kind", "stage", "step", "epoch", "network")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart with the texts that stand around it.

    Attributes:
      title: what is drawn.
      hint: its unit, weight or meaning.
      svg: the picture.
      legend: name and style of every line, if there are several.
      points: whether it shows points, not lines.
    """

    title: str
    hint: str
    svg: markupsafe.Markup
    legend: tuple[tuple[str, int], ...] = ()
    points: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageView:
    """A stage in words, numbers and charts.

    Attributes:
      name: the stage.
      learner: the network that learns, if known.
      teachers: the networks it learns from.
      terms: loss terms and their weights, as printed.
      state: `"finished"`, `"unfinished"` or `"not started"`.
      facts: (name, value) pairs such as steps and time.
      charts: the loss, its terms, the evaluation metrics and the learning rate.
    """

    name: str
    learner: str
    teachers: tuple[str, ...]
    terms: tuple[tuple[str, str], ...]
    state: str
    facts: tuple[tuple[str, str], ...]
    charts: tuple[Chart, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a chart belongs.

    Attributes:
      where: the run and the stage, for the text alternative.
      style: number of the learner's colour.
      limits: the steps that all charts of the stage show; None: those that it has.
    """

    where: str
    style: int = 0
    limits: tuple[float, float] | None = None


def stage_views(run: Run) -> list[StageView]:
    """All stages of a run: finished, going on, and planned."""
    return [_stage(run, name) for name in run.stages]


def main_metric(run: Run) -> str:
    """The metric that stands for a run: Dice, top-1 accuracy, or the first there is."""
    keys: dict[str, None] = {}
    for result in run.summary.get("results", {}).values():
        keys |= dict.fromkeys(result)
    for record in run.evaluations:
        keys |= dict.fromkeys(key for key in record if key not in _PLACE)
    for key in ("dice", "accuracy"):
        if key in keys:
            return key
    return next(iter(keys), "")


def overview(run: Run) -> Chart | None:
    """The main metric of all networks over their steps, in one chart."""
    key = main_metric(run)
    if not key:
        return None
    metric = naming.describe(key)
    learners = {
        str(stage["name"]): str(stage.get("learner", stage["name"]))
        for stage in run.summary.get("stages", [])
    }
    lines = []
    for stage in run.stages:
        records = [r for r in run.evaluations if r["stage"] == stage]
        for network in dict.fromkeys(str(r.get("network")) for r in records):
            own = [r for r in records if str(r.get("network")) == network]
            phases = [s for s, learner in learners.items() if learner == network]
            name = network if len(phases) < 2 else f"{network}, stage {stage}"
            lines.append(
                Series(
                    name=name,
                    x=[number(r["step"]) for r in own],
                    y=[metric.scale * number(r.get(key)) for r in own],
                    style=run.networks.index(network),
                )
            )
    return _lines(
        lines,
        _Place(
            where=run.name,
            limits=(0.0, max((x for line in lines for x in line.x), default=1.0)),
        ),
        title=f"{metric.heading} while training",
        hint="test records",
        size=(4.6, 2.5),
    )


def trade_off(run: Run) -> Chart | None:
    """The main metric of all networks against their operations."""
    costs = run.summary.get("costs", {})
    sparse = any("effective_macs" in cost for cost in costs.values())
    found = {
        name: number(cost.get("effective_macs", cost.get("macs")))
        for name, cost in costs.items()
    }
    what = "multiply-adds"
    x_label = "multiply-adds of one image" + (
        ", masked ones left out" if sparse else ""
    )
    return _trade_off(run, found, what, "million", 1e6, x_label)


def size_trade_off(run: Run) -> Chart | None:
    """The main metric against the bytes of the weights, where some are compressed."""
    costs = run.summary.get("costs", {})
    if not any("weight_bytes" in cost for cost in costs.values()):
        return None
    found = {
        name: number(cost.get("weight_bytes", 4 * number(cost.get("params"))))
        for name, cost in costs.items()
    }
    return _trade_off(run, found, "bytes", "KiB", 1024, "bytes of the weights")


def _trade_off(
    run: Run,
    costs: Mapping[str, float],
    what: str,
    unit: str,
    scale: float,
    x_label: str,
) -> Chart | None:
    """The main metric against a cost; a line joins what no other network surpasses."""
    metric = naming.describe(main_metric(run))
    points = [
        Series(
            name=name,
            x=[costs.get(name, math.nan)],
            y=[metric.scale * number(result.get(main_metric(run)))],
            style=run.networks.index(name),
        )
        for name, result in run.summary.get("results", {}).items()
    ]
    points = [p for p in points if p.defined.size and p.x[0] > 0]
    if len(points) < 2:
        return None
    label = f"{run.name}: {metric.heading} against {what}. " + "; ".join(
        f"{p.name}: {p.y[0]:.4g} at {p.x[0] / scale:.4g} {unit}" for p in points
    )
    svg = point_chart(
        points, label=label, x_label=x_label, frontier=metric.better, size=(4.6, 2.5)
    )
    return Chart(
        title=f"{metric.heading} against {what}",
        hint="up and to the left is better"
        if metric.better == "higher"
        else "down and to the left is better",
        svg=markupsafe.Markup(svg),
        legend=tuple((p.name, p.style) for p in points),
        points=True,
    )


def duration(seconds: float) -> str:
    """A time span in words.

    >>> [duration(s) for s in (0.4, 75, 3720)]
    ['0.4 s', '1 min 15 s', '1 h 2 min']
    """
    if not math.isfinite(seconds):
        return naming.MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def _stage(run: Run, name: str) -> StageView:
    stages = run.summary.get("stages", [])
    record: Record = next((s for s in stages if str(s["name"]) == name), {})
    train = [r for r in run.train if r["stage"] == name]
    evaluations = [r for r in run.evaluations if r["stage"] == name]
    steps = [number(r["step"]) for r in (*train, *evaluations)]
    state = "finished" if record else "unfinished" if steps else "not started"
    learners = [str(r["network"]) for r in evaluations if "network" in r]
    learner = str(record.get("learner", learners[0] if learners else ""))
    weights = record.get("method", {})
    place = _Place(
        where=f"{run.name}, stage {name}",
        style=run.networks.index(learner) if learner in run.networks else 0,
        limits=(0.0, max(steps, default=1.0)),
    )
    charts = [
        _curve("loss", "weighted sum", train, "loss", place),
        *_term_charts(train, weights, place),
        *_metric_charts(evaluations, place),
        _curve("learning rate", "", train, "learning_rate", place),
    ]
    return StageView(
        name=name,
        learner=learner,
        teachers=tuple(map(str, record.get("teachers", []))),
        terms=tuple((str(term), _weight(value)) for term, value in weights.items()),
        state=state,
        facts=tuple(_facts(record, train, steps)),
        charts=tuple(chart for chart in charts if chart is not None),
    )


def _term_charts(
    train: Sequence[Record],
    weights: Mapping[str, Any],
    place: _Place,
) -> Iterable[Chart | None]:
    """One chart per loss term."""
    terms = dict.fromkeys(key for r in train for key in r.get("terms", {}))
    if len(terms) == 1 and all(weights.get(term, 1) == 1 for term in terms):
        return  # the loss is this term
    records = [{**r.get("terms", {}), "step": r["step"]} for r in train]
    for term in terms:
        known = term in weights
        hint = f"weight {_weight(weights[term])}" if known else "unweighted"
        yield _curve(term, hint, records, term, place)


def _facts(
    record: Record, train: Sequence[Record], steps: Sequence[float]
) -> Iterable[tuple[str, str]]:
    """Steps, epochs, time and speed."""
    if "steps" in record:
        yield "steps", f"{number(record['steps']):.0f}"
    elif steps:
        yield "last step", f"{max(steps):.0f}"
    if "epochs" in record:
        yield "epochs", f"{number(record['epochs']):g}"
    if "seconds" in record:
        yield "time", duration(number(record["seconds"]))
    speed = number(record.get("images_per_second"))
    if math.isfinite(speed):
        yield "images/s", f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
    kept = number(record.get("handed_on_step"))
    if math.isfinite(kept) and kept != number(record.get("steps")):
        yield "kept", f"step {kept:.0f}"
    shares = [number(r.get("teacher_share")) for r in train]
    if shares and math.isfinite(shares[-1]):
        yield "teacher's share of the arithmetic", f"{shares[-1]:.0%}"


def _metric_charts(records: Sequence[Record], place: _Place) -> Iterable[Chart | None]:
    """One chart per metric; the scores per class share one."""
    keys = dict.fromkeys(key for r in records for key in r if key not in _PLACE)
    keys = [key for key in keys if not key.endswith("_undefined")]
    for key in (key for key in keys if "/" not in key):
        metric = naming.describe(key)
        scaled = [
            {"step": r["step"], key: metric.scale * number(r.get(key))} for r in records
        ]
        yield _curve(metric.heading, "test records", scaled, key, place)
    families = dict.fromkeys(key.partition("/")[0] for key in keys if "/" in key)
    for family in families:
        metric = naming.describe(family)
        members = [key for key in keys if key.startswith(f"{family}/")]
        lines = [
            Series(
                name=key.partition("/")[2],
                x=[number(r["step"]) for r in records],
                y=[metric.scale * number(r.get(key)) for r in records],
                style=i,
            )
            for i, key in enumerate(members)
        ]
        title = f"{metric.heading} per class"
        yield _lines(lines, place, title=title, hint="test records")


def _curve(
    title: str,
    hint: str,
    records: Sequence[Mapping[str, Any]],
    key: str,
    place: _Place,
) -> Chart | None:
    """A chart of one value of records."""
    line = Series(
        name=title,
        x=[number(r["step"]) for r in records],
        y=[number(r.get(key)) for r in records],
        style=place.style,
    )
    return _lines([line], place, title=title, hint=hint)


def _lines(
    lines: Sequence[Series],
    place: _Place,
    *,
    title: str,
    hint: str,
    size: tuple[float, float] = (3.5, 2.0),
) -> Chart | None:
    """A chart of lines with its legend; None if no line has a value."""
    lines = [line for line in lines if line.defined.size]
    if not lines:
        return None
    label = f"{place.where}: {title}. " + "; ".join(
        f"{line.name}: from {line.defined[0]:.4g} to {line.defined[-1]:.4g}"
        for line in lines
    )
    svg = line_chart(lines, label=label, x_limits=place.limits, size=size)
    legend = tuple((line.name, line.style) for line in lines) if len(lines) > 1 else ()
    # `line_chart` escapes what it is given.
    return Chart(title=title, hint=hint, svg=markupsafe.Markup(svg), legend=legend)


def _weight(value: Any) -> str:
    """A weight as printed; a schedule's description as it is."""
    return f"{number(value):g}" if math.isfinite(number(value)) else str(value)
