"""The pages of the methods are those that their docstrings make."""

import importlib.util
import inspect
from pathlib import Path

import pytest

from jaxkd import distill
from jaxkd.distill.registry import factory

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pages():
    path = ROOT / "docs" / "method_pages.py"
    spec = importlib.util.spec_from_file_location("method_pages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_up_to_date(pages):
    stale = [
        path.relative_to(ROOT).as_posix()
        for path, text in pages.generate().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    assert not stale, "run python docs/method_pages.py"


@pytest.mark.parametrize("name", distill.names())
def test_every_method_has_its_page_with_a_source(pages, name):
    text = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    if name not in pages.BY_HAND:
        assert "## Use" in text and "## Measured" in text


@pytest.mark.parametrize("name", distill.names())
def test_every_option_of_a_method_is_explained(pages, name):
    make = factory(name)
    _, _, parts = pages.sections(inspect.getdoc(make) or "")
    explained = pages.arguments(parts.get("Args", ""))
    options = [p for p in make.__annotations__ if p != "return"]
    assert [option for option in options if option not in explained] == []


def test_parts_of_a_docstring_are_told_apart(pages):
    first, description, parts = pages.sections(
        "What it does.\n\nMore of it:\n\n    a = b\n\nNeeds: one\nthing.\n\n"
        "Args:\n  x: first\n    line.\n  y: second.\n"
    )
    assert first == "What it does."
    assert pages.fenced(description) == "More of it:\n\n```text\na = b\n```"
    assert parts["Needs"] == "one\nthing."
    assert pages.arguments(parts["Args"]) == {"x": "first line.", "y": "second."}


SITE = """site_name: jaxkd
nav:
  - Home: index.md
{before}  - Methods:
      - All methods: methods/table.md
      - old: methods/old.md
{after}plugins:
  - search
"""


@pytest.mark.parametrize("before", ["", "  - Compression:\n      - a: a.md\n"])
@pytest.mark.parametrize(
    "after",
    [
        "",
        "  - Design: design.md\n",
        "  - Pruning:\n      - masks: pruning/masks.md\n  - Design: design.md\n",
    ],
)
def test_the_navigation_keeps_what_stands_beside_the_methods(pages, before, after):
    current = SITE.format(before=before, after=after)
    found = pages.navigation(current, ["ab", "kd"])
    new = "      - Your own method: methods/own.md\n"
    new += "      - ab: methods/ab.md\n      - kd: methods/kd.md\n"
    assert found == current.replace("      - old: methods/old.md\n", new)
    assert pages.navigation(found, ["ab", "kd"]) == found


def test_a_navigation_without_methods_is_refused(pages):
    with pytest.raises(ValueError, match="no entry 'Methods'"):
        pages.navigation("nav:\n  - Home: index.md\n", ["kd"])
