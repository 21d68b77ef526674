"""Writes docs/methods/NAME.md for every method from its docstring and the results.

    python docs/method_pages.py

The text of a page is the docstring of the method's factory; the options are its
signature; the numbers are those of docs/methods/*.json, which bench/distill_table.py
writes. The pages of HLFD and KD are written by hand. The table of all methods and the
site's navigation are written too. A test fails when a page is not up to date.
"""

from __future__ import annotations

import inspect
import json
import re
import statistics
import sys
import typing
from pathlib import Path

from jaxkd import distill
from jaxkd.distill.registry import factory

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "methods"
BY_HAND = ("hlfd", "kd")
TABLES = {"digits": "accuracy", "liver": "Dice"}
SECTIONS = (
    "Needs",
    "Cost",
    "Pitfalls",
    "Paper and code",
    "Recipes",
    "Published",
    "Reference",
)
# The names of recipes in the tables that are not those of their method.
ROWS = {
    "lskd": "logit_standardization",
    "dkd_lskd": "logit_standardization",
    "mlld_lskd": "mlld",
}
NAVIGATION = ROOT / "mkdocs.yml"


def sections(text: str) -> tuple[str, str, dict[str, str]]:
    """The first line of a docstring, its description and its named parts."""
    known = "|".join((*SECTIONS, "Args", "Raises"))
    head, *rest = re.split(rf"\n(?=(?:{known}):(?: |\n))", text)
    first, _, description = head.partition("\n")
    parts = {}
    for part in rest:
        name, _, body = part.partition(":")
        parts[name] = inspect.cleandoc(body)
    return first, inspect.cleandoc(description), parts


def arguments(text: str) -> dict[str, str]:
    """What the `Args` part of a docstring says of each option."""
    found = re.split(r"^(\w+): ", text, flags=re.M)[1:]
    return {
        name: " ".join(body.split())
        for name, body in zip(found[::2], found[1::2], strict=True)
    }


def fenced(text: str) -> str:
    """Indented blocks of a docstring as fenced blocks, `names` as they are."""
    lines, block = [], False
    for line in text.splitlines():
        indented = line.startswith("    ")
        if indented and not block:
            lines += ["```text"]
        if block and line and not indented:
            while lines[-1] == "":
                lines.pop()
            lines += ["```", ""]
        block = indented or (block and not line)
        lines.append(line[4:] if indented else line)
    while lines and lines[-1] == "":
        lines.pop()
    return "\n".join([*lines, "```"] if block else lines)


def page(name: str, results: dict[str, dict]) -> str:
    """The page of one method."""
    make = factory(name)
    first, description, parts = sections(inspect.getdoc(make) or "")
    lines = [f"# `{name}`", "", first, ""]
    if description:
        lines += [fenced(description), ""]
    lines += ["## Use", "", *use(name), ""]
    lines += options(make, arguments(parts.get("Args", "")))
    for title in SECTIONS[:-1]:
        if title in parts:
            text = parts[title][:1].upper() + parts[title][1:]
            lines += [f"## {title}", "", fenced(text), ""]
    lines += ["## Measured", "", *measured(name, results), ""]
    used = loss_names(make)
    if used:
        lines += ["## Losses", "", *losses(used), ""]
    if "Reference" in parts:
        lines += ["## Reference", "", parts["Reference"], ""]
    lines += [
        "---",
        "",
        f"Made by `docs/method_pages.py` from `{make.__module__}`; change it there.",
    ]
    return "\n".join(lines) + "\n"


def use(name: str) -> list[str]:
    method = distill.create(name) if not required(name) else None
    lines = ["```python", "from jaxkd import distill", ""]
    weights = f'{{"ce": 1.0, "{name}": 1.0}}'
    if method is not None and ({"ce"} & set(method.weights) or name in ALONE):
        weights = f'{{"{name}": 1.0}}'
    lines += [f"method = distill.weighted({weights})", "```"]
    if method is not None:
        terms = ", ".join(
            f"`{term}`" + ("" if callable(w) else f" ({w:g})")
            for term, w in method.weights.items()
        )
        teachers = {0: "no teacher", 1: "one teacher", 2: "two teachers"}.get(
            method.num_teachers, "one teacher or more"
        )
        lines += ["", f"Terms and their weights: {terms}. Reads {teachers}."]
        if method.num_students > 1:
            lines[-1] += f" Trains {method.num_students} students together."
        if method.readout is not None:
            lines[-1] += " What it trains takes part in the student's prediction."
    return lines


# Methods without a part for the labels beside them: those that are or hold a task loss,
# use no labels, or have a stage of their own.
ALONE = (
    *("ce", "focal", "dice", "bce_dice", "focal_dice"),
    *("simkd", "function_matching", "fkd", "pskd", "meal", "meal_v2", "mgd_ssss"),
    # First stages.
    *("ab", "fsp", "ghnd", "hnd"),
)


def required(name: str) -> bool:
    parameters = inspect.signature(factory(name)).parameters.values()
    return any(p.default is p.empty for p in parameters)


def options(make, texts: dict[str, str]) -> list[str]:
    parameters = inspect.signature(make).parameters
    if not parameters:
        return []
    hints = typing.get_type_hints(make)
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for name, parameter in parameters.items():
        choices = ""
        if typing.get_origin(hints.get(name)) is typing.Literal:
            values = ", ".join(f"`{v!r}`" for v in typing.get_args(hints[name]))
            choices = f" One of {values}."
        meaning = texts.get(name, "").replace("|", "\\|")
        lines.append(f"| `{name}` | `{parameter.default!r}` | {meaning}{choices} |")
    return [*lines, ""]


def measured(name: str, results: dict[str, dict]) -> list[str]:
    lines = []
    for table, data in results.items():
        for row, values in data["methods"].items():
            if ROWS.get(row, row) != name:
                continue
            scores = [100 * s for s in values["scores"]]
            none = [100 * s for s in data["methods"]["none"]["scores"]]
            gains = [a - b for a, b in zip(scores, none, strict=True)]
            step, kd = values["milliseconds"], data["methods"]["kd"]["milliseconds"]
            cost = ""
            if step is not None and kd is not None:
                cost = f"; a step takes {step / kd:.2f} times that of KD"
            called = "" if row == name else f" (`{row}`)"
            lines.append(
                f"* {table}{called}: {TABLES[table]} {spread(scores)} %, against the "
                f"student alone {spread(gains, sign='+')}{cost}."
            )
    if not lines:
        return ["Not in the [tables](table.md) yet."]
    return [*lines, "", "Settings and spread: [all methods](table.md)."]


def spread(values: list[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{sign}.2f} ± {deviation:.2f}"


def loss_names(make) -> list[str]:
    """The losses that a factory, or else its module, uses."""
    from jaxkd import losses as library

    for source in (inspect.getsource(make), inspect.getsource(inspect.getmodule(make))):
        found = dict.fromkeys(re.findall(r"\blosses\.(\w+)\(", source))
        names = [n for n in found if n in library.__all__]
        if names:
            return names
    return []


def losses(names: list[str]) -> list[str]:
    lines = []
    for name in names:
        lines += [f"::: jaxkd.losses.{name}", ""]
    return lines[:-1]


def table_page(results: dict[str, dict]) -> str:
    sys.path.insert(0, str(ROOT / "bench"))
    from distill_table import markdown

    lines = [
        "# All methods",
        "",
        "Every method teaches the same student from the same teacher: equal initial",
        "weights, batches and augmentation for each seed. The recipes are those of",
        "`configs/shared.py`, made for CIFAR-100 and large images; nothing is tuned to",
        "these small sets. **The tables show that the methods run and what they cost;",
        "they say little about which is best.** The time of a step is that of tiny",
        "networks on a CPU, where small operations weigh more than on real ones.",
        "",
        "Methods without a teacher still stand against KD's step, which has one.",
        "`ab` and `fsp` have a first stage; the time is that of the last one. `mlld`",
        "reads two views; `dml` trains two students, the first of which is shown.",
        "",
        "On digits the student is a small fraction of its teacher and trains for eight",
        "epochs. Few methods help it. Loss weights chosen for 240 epochs of CIFAR-100",
        "outvote the labels here: where the student ends far below the one alone, that",
        "is what the row shows, not a fault of the method.",
        "",
        "On liver slices of 64x64 pixels the student is far below its teacher, and so",
        "it stays. `kd` and `skd_pixel`, which weigh all pixels alike, nearly all of",
        "them background, end with hardly any liver found. The machine did other work,",
        "so this table has no times; `skd`, which trains a critic of whole maps, was",
        "left out for its time.",
        "",
    ]
    for name, data in results.items():
        lines += [f"## {name}", "", markdown(data), ""]
    lines += ["---", "", "Made by `docs/method_pages.py`."]
    return "\n".join(lines) + "\n"


def navigation(current: str, names: list[str]) -> str:
    """The site's settings with the pages of the methods, and all else as it is."""
    entries = ["      - All methods: methods/table.md"]
    entries += ["      - Your own method: methods/own.md"]
    entries += [f"      - {name}: methods/{name}.md" for name in names]
    begin = "  - Methods:\n"
    before, found, rest = current.partition(begin)
    if not found:
        raise ValueError(f"{NAVIGATION.name} has no entry 'Methods' in its nav")
    # Its own entries stand deeper than the entries beside it.
    after = re.sub(r"\A(?: {4,}.*\n)*", "", rest)
    return before + begin + "\n".join(entries) + "\n" + after


def load_results() -> dict[str, dict]:
    return {
        name: json.loads((PAGES / f"{name}.json").read_text())
        for name in TABLES
        if (PAGES / f"{name}.json").exists()
    }


def generate() -> dict[Path, str]:
    """The text of every file that this script writes."""
    results = load_results()
    names = distill.names()
    files = {
        PAGES / f"{name}.md": page(name, results)
        for name in names
        if name not in BY_HAND
    }
    files[PAGES / "table.md"] = table_page(results)
    files[NAVIGATION] = navigation(NAVIGATION.read_text(), names)
    return files


if __name__ == "__main__":
    for path, content in generate().items():
        path.write_text(content)
    print(f"{len(distill.names())} methods", file=sys.stderr)
