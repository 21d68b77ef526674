"""Charts are small, well-formed, take the page's colours and belong to one page."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxkd.report import curves
from jaxkd.report.curves import Series


def line(n=20, *, style=0, name="loss", start=1.0):
    x = np.arange(n) * 10
    return Series(name=name, x=x, y=start * np.exp(-x / 100), style=style)


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_a_chart_is_one_well_formed_element():
    root = ElementTree.fromstring(curves.line_chart([line()], label="loss"))
    assert root.tag == "svg"
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] == "loss"
    assert root[0].tag == "title" and root[0].text == "loss"


def test_a_chart_takes_colours_and_font_from_the_page():
    svg = curves.line_chart([line(style=0), line(style=9)], label="x")
    assert "var(--series-0)" in svg and "var(--series-1)" in svg
    assert "var(--muted)" in svg and "var(--line)" in svg
    assert not re.search(r"#[0-9a-fA-F]{6}\b", svg)
    assert "font-family" not in svg and "DejaVu" not in svg


def test_a_chart_loads_nothing_and_styles_nothing_else():
    svg = curves.line_chart([line()], label="x")
    assert "http" not in svg and "<style" not in svg and "<metadata" not in svg
    assert all(ref.startswith("#") for ref in re.findall(r'href="([^"]*)"', svg))


def test_ids_of_two_charts_never_meet():
    charts = [curves.line_chart([line(start=s)], label="x") for s in (1.0, 2.0)]
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in charts]
    assert ids[0] and not ids[0] & ids[1]
    for svg, own in zip(charts, ids, strict=True):
        assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)) <= own


def test_the_same_chart_is_the_same_text():
    assert curves.line_chart([line()], label="x") == curves.line_chart(
        [line()], label="x"
    )


def test_labels_are_escaped():
    svg = curves.line_chart([line()], label='<script>"&</script>')
    assert "<script>" not in svg
    assert ElementTree.fromstring(svg).attrib["aria-label"] == '<script>"&</script>'


def test_small_values_keep_their_digits():
    svg = curves.line_chart([line(start=0.003)], label="learning rate")
    assert "0.003" in texts(svg)


def test_values_over_decades_get_a_logarithmic_axis():
    x = [0.0, 1.0, 2.0, 3.0]
    svg = curves.line_chart(
        [Series(name="a", x=x, y=[1e-4, 1e-2, 1.0, 100.0])], label="a"
    )
    assert {"1", "0.01", "100", "1e\u22124"} & set(texts(svg)) >= {"1", "0.01"}


def test_charts_of_one_range_share_their_steps():
    charts = [
        curves.line_chart([line(n)], label="x", x_limits=(0.0, 400.0)) for n in (5, 40)
    ]
    steps = [[t for t in texts(svg) if t.isdigit() and int(t) >= 100] for svg in charts]
    assert steps[0] == steps[1] == ["100", "200", "300", "400"]


def test_gaps_and_a_single_point_are_drawn():
    gaps = Series(name="a", x=[1.0, 2.0, 3.0], y=[1.0, float("nan"), 2.0])
    one = Series(name="b", x=[2.0], y=[0.5], style=1)
    svg = curves.line_chart([gaps, one], label="x")
    assert "nan" not in svg.lower()
    ElementTree.fromstring(svg)


def test_a_chart_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one series with a finite value"):
        curves.line_chart([Series(name="a", x=[1.0], y=[float("nan")])], label="x")


def test_long_series_are_thinned_and_stay_small():
    x = np.arange(100_000)
    svg = curves.line_chart([Series(name="a", x=x, y=np.sin(x / 9000))], label="x")
    assert len(svg) < 40_000


def test_points_are_drawn_over_a_logarithmic_cost():
    points = [
        Series(name="a", x=[9e7], y=[0.9], style=0),
        Series(name="b", x=[2.3e9], y=[0.93], style=1),
    ]
    svg = curves.point_chart(points, label="x", x_label="multiply-adds")
    assert {"100M", "1G", "multiply-adds"} <= set(texts(svg))


@pytest.mark.parametrize("points", [7, 10, 64])
def test_thinning_keeps_means_and_order(points):
    x = np.arange(64)
    y = np.random.default_rng(0).normal(size=64)
    places, values = curves.thinned(x, y, points=points)
    assert len(places) <= points and (np.diff(places) > 0).all()
    size = -(-64 // points)
    np.testing.assert_allclose(values[0], y[:size].mean())
    np.testing.assert_allclose(values[-1], y[(len(values) - 1) * size :].mean())


def test_moving_mean_equals_its_definition():
    values = np.random.default_rng(1).normal(size=30)
    values[[4, 5, 6, 7, 8]] = np.nan
    expected = [
        np.nanmean(w) if np.isfinite(w).any() else np.nan
        for w in (values[max(0, i - 2) : i + 3] for i in range(30))
    ]
    np.testing.assert_allclose(curves.moving_mean(values, 5), expected)
    np.testing.assert_allclose(curves.moving_mean(values, 4), expected)


def test_the_frontier_is_what_no_other_point_surpasses():
    points = [
        curves.Series(name=str(i), x=[x], y=[y])
        for i, (x, y) in enumerate(
            [(1, 5), (2, 4), (3, 7), (3, 6), (9, 7), (4, math.nan)]
        )
    ]
    assert curves.pareto_frontier(points, higher=True) == ([1, 3], [5, 7])
    assert curves.pareto_frontier(points, higher=False) == ([1, 2], [5, 4])


def test_a_line_joins_the_frontier():
    points = [
        curves.Series(name=str(x), x=[x], y=[y]) for x, y in [(1, 5), (2, 4), (3, 7)]
    ]
    options = dict(label="a", x_label="cost")
    plain = curves.point_chart(points, **options)
    joined = curves.point_chart(points, frontier="higher", **options)
    assert joined.count("<path") > plain.count("<path")
    assert curves.point_chart(points[:1], frontier="higher", **options)
