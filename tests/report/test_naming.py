"""Metrics are printed with their units and signs."""

import math

import pytest

from jaxkd.report import naming


@pytest.mark.parametrize(
    ("key", "value", "heading", "text"),
    [
        ("dice", 0.93126, "Dice", "0.9313"),
        ("accuracy", 0.93126, "Top-1 (%)", "93.13"),
        ("hd95", 12.345678, "HD95 (px)", "12.35"),
        ("ravd", 0.0312, "RAVD", "+0.0312"),
        ("ravd", -0.0312, "RAVD", "-0.0312"),
        ("ravd", 0.00001, "RAVD", "0.0000"),
        ("ravd", -0.00001, "RAVD", "0.0000"),
        ("dice/tumour", 0.5, "Dice tumour", "0.5000"),
        ("something/new", 0.5, "something/new", "0.5000"),
        ("dice", math.nan, "Dice", "–"),
        ("nll", math.inf, "NLL", "–"),
    ],
)
def test_metrics_have_headings_units_and_digits(key, value, heading, text):
    metric = naming.describe(key)
    assert metric.heading == heading
    assert metric.text(value) == text


def test_what_is_good_is_known_for_every_metric_but_not_for_unknown_ones():
    assert all(metric.better for metric in naming.METRICS.values())
    assert all(metric.meaning for metric in naming.METRICS.values())
    assert naming.describe("dice/tumour").better == "higher"
    assert naming.describe("unheard of").better is None


def test_spread_is_the_sample_standard_deviation():
    # Of 0.90, 0.92, 0.94: mean 0.92, deviation sqrt(0.0008 / 2) = 0.02.
    assert naming.describe("dice").spread([0.9, 0.92, 0.94]) == "0.9200 ± 0.0200"
    assert naming.describe("accuracy").spread([0.9, 0.92, 0.94]) == "92.00 ± 2.00"


def test_spread_leaves_out_what_is_undefined_and_says_so():
    dice = naming.describe("dice")
    assert dice.spread([0.9, math.nan, 0.94]) == "0.9200 ± 0.0283 (2 of 3)"
    assert dice.spread([0.9, math.nan]) == "0.9000 (1 of 2)"
    assert dice.spread([0.9]) == "0.9000"
    assert dice.spread([math.nan, math.inf]) == "–"
    assert dice.spread([]) == "–"
