"""The page's style sheet fits its template and can be read in both themes."""

import importlib.resources
import re

import pytest

from jaxkd.report.curves import SERIES_COLOURS

TEMPLATES = importlib.resources.files("jaxkd.report") / "templates"
CSS = (TEMPLATES / "report.css").read_text("utf-8")
HTML = (TEMPLATES / "report.html.jinja").read_text("utf-8")


def variables(theme):
    """The custom properties of a theme; the dark one changes some of the light."""
    light, dark = re.findall(r":root \{(.*?)\}", CSS, flags=re.DOTALL)
    text = light if theme == "light" else light + dark
    return dict(re.findall(r"(--[\w-]+): ([^;]+);", text))


def luminance(colour):
    """Relative luminance of WCAG 2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    ]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read(theme):
    v = variables(theme)
    for text in ("--ink", "--muted", "--accent", "--wrong"):
        for ground in ("--page", "--surface"):
            assert contrast(v[text], v[ground]) >= 4.5, (text, ground)
    assert contrast(v["--warn"], v["--warn-surface"]) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_stand_out_from_the_page(theme):
    v = variables(theme)
    for i in range(SERIES_COLOURS):
        assert contrast(v[f"--series-{i}"], v["--page"]) >= 3


def test_every_variable_that_is_used_is_defined():
    used = set(re.findall(r"var\((--[\w-]+)\)", CSS + HTML))
    assert used <= set(variables("light"))


def test_every_class_of_the_template_has_a_style_and_the_other_way_round():
    named = set()
    for value in re.findall(r'class="((?:[^"{]|\{\{.*?\}\}|\{%.*?%\})*)"', HTML):
        plain = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", " ", value)
        named |= set(plain.split())
        named |= {w for q in re.findall(r"'([ \w]+)'", value) for w in q.split()}
    named -= {"finished"}  # a status, compared within a class attribute
    styled = set(re.findall(r"\.([a-z][\w-]*)", re.sub(r"\d\.\d|/\*.*?\*/", "", CSS)))
    assert named == styled


def test_the_template_marks_nothing_as_safe():
    assert "|safe" not in HTML.replace(" ", "")
    assert "autoescape" not in re.sub(r"\{#.*?#\}", "", HTML).lower()
