"""Line charts as inline SVG that takes its colours and its font from the page.

matplotlib draws with placeholder colours, which are then replaced by CSS variables, so
that one picture fits the light and the dark page. Names come from the page's HTML, not
from the picture: a chart holds numbers and fixed axis labels only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

SERIES_COLOURS = 8

# Placeholders that matplotlib writes as they are, and the CSS that replaces them.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_COLOURS: Mapping[str, str] = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    **{f"#0400{i:02x}": f"var(--series-{i})" for i in range(SERIES_COLOURS)},
}
_MARKERS = ("o", "s", "D", "^", "v", "P")
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
# Above this many points a line is drawn thin with its moving mean on top.
_DENSE = 60
_MAX_POINTS = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart.

    Attributes:
      name: for the legend, which the page writes.
      x: positions, ascending.
      y: values; those that are not finite leave gaps.
      style: number of its colour and dash; series of one name keep it on all charts.
    """

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    style: int = 0

    @property
    def defined(self) -> np.ndarray:
        """The finite values."""
        values = np.asarray(self.y, np.float64)
        return values[np.isfinite(values)]


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "step",
    x_limits: tuple[float, float] | None = None,
    size: tuple[float, float] = (3.5, 2.0),
) -> str:
    """Draws series over steps.

    The value axis is logarithmic where positive values span more than two decades.

    Args:
      series: the lines; those without finite values are left out.
      label: text alternative of the picture, different for every one of a page.
      x_label: label of the horizontal axis.
      x_limits: range of the horizontal axis, to share it between charts.
      size: width and height in inches; the page scales the picture to its column.

    Returns:
      An `<svg>` element as text. All text in it is escaped.

    Raises:
      ValueError: no series has a finite value.
    """
    from matplotlib import ticker

    series = _with_values(series)

    def draw(axes: Any) -> None:
        for line in series:
            _draw_line(axes, line, dashed=len(series) > 1)
        axes.xaxis.set_major_locator(
            ticker.MaxNLocator(5, integer=True, steps=[1, 2, 5, 10])
        )
        if x_limits is not None:
            margin = 0.02 * (x_limits[1] - x_limits[0]) or 0.5
            axes.set_xlim(x_limits[0] - margin, x_limits[1] + margin)

    return _chart(draw, series, label=label, x_label=x_label, size=size)


def point_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    frontier: str | None = None,
    size: tuple[float, float] = (3.5, 2.0),
) -> str:
    """Draws points over a positive quantity on a logarithmic axis.

    Args:
      series: the points; those without finite values are left out.
      label: text alternative of the picture, different for every one of a page.
      x_label: label of the horizontal axis.
      frontier: "higher" or "lower", what is better: a line joins the points that no
        other surpasses at their cost; None for no line.
      size: width and height in inches; the page scales the picture to its column.

    Returns:
      An `<svg>` element as text. All text in it is escaped.

    Raises:
      ValueError: no series has a finite value.
    """
    from matplotlib import ticker

    series = _with_values(series)

    def draw(axes: Any) -> None:
        if frontier is not None:
            x, y = pareto_frontier(series, higher=frontier == "higher")
            if len(x) > 1:
                axes.plot(x, y, color=_MUTED, linewidth=1, zorder=1)
        for i, points in enumerate(series):
            axes.plot(
                points.x,
                points.y,
                linestyle="none",
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=8,
                color=_series_colour(points.style),
                clip_on=False,
            )
        axes.set_xscale("log")
        axes.margins(0.08, 0.2)
        reach = [x for points in series for x in points.x]
        marks = (1.0,) if max(reach) / min(reach) > 200 else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=marks))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())

    return _chart(draw, series, label=label, x_label=x_label, size=size)


def pareto_frontier(
    series: Sequence[Series], *, higher: bool
) -> tuple[list[float], list[float]]:
    """The points that no other one surpasses at the same cost or less.

    Args:
      series: the points; their cost is `x`.
      higher: whether larger values are better.

    Returns:
      Their costs, ascending, and their values.
    """
    sign = 1.0 if higher else -1.0
    pairs = [
        (float(x), float(y))
        for points in series
        for x, y in zip(points.x, points.y, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    best: list[tuple[float, float]] = []
    for x, y in sorted(pairs, key=lambda pair: (pair[0], -sign * pair[1])):
        if not best or sign * y > sign * best[-1][1]:
            best.append((x, y))
    return [x for x, _ in best], [y for _, y in best]


def moving_mean(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean; at the ends the window shrinks, gaps are left out of it.

    Args:
      values: `[n]`, may hold NaN.
      window: number of values, made odd.

    Returns:
      Float64 `[n]`; NaN where a window holds no finite value.
    """
    array = np.asarray(values, np.float64)
    kernel = np.ones(2 * (window // 2) + 1)
    half = len(kernel) // 2
    finite = np.isfinite(array)

    def windowed(x: np.ndarray) -> np.ndarray:
        return np.convolve(np.pad(x, half), kernel, mode="valid")

    total = windowed(np.where(finite, array, 0.0))
    count = windowed(finite.astype(np.float64))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def thinned(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    *,
    points: int = _MAX_POINTS,
) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` points: means of neighbours, so that no picture grows large.

    Args:
      x: positions `[n]`.
      y: values `[n]`.
      points: the most to keep.

    Returns:
      Positions and values, float64.
    """
    places, values = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(places) <= points:
        return places, values
    size = math.ceil(len(places) / points)
    starts = np.arange(0, len(places), size)
    counts = np.diff(np.append(starts, len(places)))
    return (
        np.add.reduceat(places, starts) / counts,
        np.add.reduceat(values, starts) / counts,
    )


def _with_values(series: Sequence[Series]) -> list[Series]:
    found = [s for s in series if s.defined.size]
    if not found:
        raise ValueError("a chart needs at least one series with a finite value")
    return found


def _chart(
    draw: Callable[[Any], None],
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    size: tuple[float, float],
) -> str:
    """Draws into quiet axes and returns the picture for the page."""
    import matplotlib
    from matplotlib import ticker
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        # Text stays text: it is sharp, small and in the font of the page.
        "svg.fonttype": "none",
        # Names of inner parts come from their content: one chart, one text.
        "svg.hashsalt": "jaxkd",
        "font.size": 8.5,
        "text.color": _MUTED,
        "axes.labelcolor": _MUTED,
        "axes.edgecolor": _GRID,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        draw(axes)
        if _spans_decades(np.concatenate([s.defined for s in series])):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(_plain))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        else:
            locator = ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5], min_n_ticks=3)
            axes.yaxis.set_major_locator(locator)
            formatter = ticker.ScalarFormatter(useOffset=False)
            formatter.set_scientific(False)
            axes.yaxis.set_major_formatter(formatter)
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(_thousands))
        axes.set_xlabel(x_label)
        axes.grid(True, axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(which="both", length=0)
        axes.tick_params(axis="x", which="major", length=3)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return _inline(buffer.getvalue(), label)


def _draw_line(axes: Any, series: Series, *, dashed: bool) -> None:
    """Draws a line; a dense one thin, with its moving mean."""
    colour = _series_colour(series.style)
    x, y = thinned(series.x, series.y)
    dense = len(x) > _DENSE
    if dense:
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
        y = moving_mean(y, len(y) // 15)
    axes.plot(
        x,
        y,
        color=colour,
        linewidth=1.7,
        linestyle=_DASHES[series.style % len(_DASHES)] if dashed else "-",
        marker="o" if len(x) <= 30 else None,
        # A single point has no line to show it.
        markersize=2.6 if len(x) > 1 else 6,
        solid_capstyle="round",
    )


def _series_colour(style: int) -> str:
    return f"#0400{style % SERIES_COLOURS:02x}"


def _spans_decades(values: np.ndarray) -> bool:
    return bool(values.min() > 0 and values.max() / values.min() > 100)


def _plain(value: float, _position: int = 0) -> str:
    """A short decimal, never mathematical markup."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "\u2212")
    return f"{value:.4g}".replace("-", "\u2212")


def _thousands(value: float, _position: int = 0) -> str:
    """A count in short: 1500, 20k, 3M, 2G.

    >>> [_thousands(v) for v in (1500, 20_000, 3e6, 2.5e9)]
    ['1500', '20k', '3M', '2.5G']
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and (letter != "k" or abs(value) >= 10_000):
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _inline(svg: str, label: str) -> str:
    """An SVG file as an element of a page that holds several."""
    svg = svg[svg.index("<svg") :]
    # matplotlib's style sheet would apply to the whole page.
    for element in ("metadata", "style"):
        svg = re.sub(rf"<{element}.*?</{element}>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    for placeholder, css in _COLOURS.items():
        svg = svg.replace(placeholder, css)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    # Coordinates need two decimals; numbers between tags are labels and stay.
    svg = re.sub(
        r'"[^"]*"',
        lambda value: re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", value[0]),
        svg,
    )
    svg = re.sub(r"\s*\n\s*", " ", svg).replace("> <", "><").replace("xlink:", "")
    # The page may hold many pictures: their ids must differ, as their labels do, and
    # most are not used.
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    prefix = f"c{hashlib.sha256((svg + label).encode()).hexdigest()[:8]}-"
    svg = re.sub(
        r' id="([^"]+)"',
        lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "",
        svg,
    )
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}", svg)
    opening = re.match(r"<svg[^>]*>", svg)
    view_box = re.search(r'viewBox="([^"]+)"', svg)
    if opening is None or view_box is None:
        raise ValueError("matplotlib wrote an SVG without a view box")
    text = html.escape(label)
    return (
        f'<svg viewBox="{view_box[1]}" role="img" aria-label="{text}">'
        f"<title>{text}</title>{svg[opening.end() :].strip()}"
    )
