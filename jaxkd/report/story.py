"""The page's first lines: what came out, in a sentence and a few large numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jaxkd.report import naming
from jaxkd.report.run import Run, number
from jaxkd.report.stages import duration, main_metric

# The networks of the usual comparison, by their fixed names.
_TEACHER, _ALONE, _STUDENT = "teacher", "student_alone", "student"


def lead(run: Run) -> str:
    """One or two sentences on the outcome, with the signs as they are."""
    key = main_metric(run)
    values = _values(run, key)
    if not values:
        return "No network has been evaluated yet."
    metric = naming.describe(key)
    records = number(run.summary.get("data", {}).get("test_records"))
    where = f"On {records:.0f} test records" if records > 0 else "On the test records"
    if _STUDENT not in values or len(values) == 1:
        choose = min if metric.better == "lower" else max
        name = choose(values, key=lambda n: values[n])
        return (
            f"{where} {name} reaches {metric.name} {_with_unit(metric, values[name])}."
        )
    sentence = (
        f"{where} the student reaches {metric.name} "
        f"{_with_unit(metric, values[_STUDENT])}"
    )
    comparisons = [
        f"{_difference(metric, values[_STUDENT] - values[other])} {words}"
        for other, words in (
            (_ALONE, "the same network trained alone"),
            (_TEACHER, "its teacher"),
        )
        if other in values
    ]
    if comparisons:
        sentence += f": {' and '.join(comparisons)}"
    savings = [
        f"{ratio} times fewer {what}"
        for what, ratio in (
            ("parameters", _ratio(run, "params")),
            ("multiply-adds", _ratio(run, "macs")),
        )
        if ratio
    ]
    if savings:
        sentence += f". It has {' and '.join(savings)} than the teacher"
    return f"{sentence}."


def tiles(run: Run) -> Iterable[tuple[str, str, str]]:
    """Large numbers: what, value, and where it comes from."""
    key = main_metric(run)
    metric = naming.describe(key)
    values = _values(run, key)
    for name, value in values.items():
        yield name, _with_unit(metric, value), metric.name
    ratio = _ratio(run, "params")
    if ratio and _STUDENT in values:
        yield "smaller", f"{ratio}×", "parameters, student against teacher"
    seconds = [number(s.get("seconds")) for s in run.summary.get("stages", [])]
    if seconds and all(map(math.isfinite, seconds)):
        what = "stage" if len(seconds) == 1 else "stages"
        yield "time", duration(sum(seconds)), f"{len(seconds)} {what}, all in all"


def _values(run: Run, key: str) -> dict[str, float]:
    """The defined values of a metric by network."""
    values = {
        name: number(result.get(key))
        for name, result in run.summary.get("results", {}).items()
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _with_unit(metric: naming.Metric, value: float) -> str:
    return f"{metric.text(value)}\u202f{metric.unit}".rstrip()


def _difference(metric: naming.Metric, value: float) -> str:
    """A difference in words, e.g. `0.0210 above`."""
    text = metric.text(abs(value)).removeprefix("+")
    if float(text) == 0:
        return "level with"
    unit = " points" if metric.unit == "%" else f" {metric.unit}".rstrip()
    return f"{text}{unit} {'above' if value > 0 else 'below'}"


def _ratio(run: Run, cost: str) -> str:
    """How many times less the student costs than the teacher; empty if it does not."""
    costs = run.summary.get("costs", {})
    teacher = number(costs.get(_TEACHER, {}).get(cost))
    student = number(costs.get(_STUDENT, {}).get(cost))
    if not (math.isfinite(teacher) and student > 0 and teacher > student):
        return ""
    ratio = teacher / student
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
