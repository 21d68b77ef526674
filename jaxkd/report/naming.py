"""How metrics are called, printed and explained, and which of their values are good."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from jaxkd.metrics.segmentation import nan_mean

MISSING = "–"

Better = Literal["higher", "lower", "zero"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is called and printed.

    Attributes:
      name: heading of its column.
      unit: printed after the name in brackets, if any.
      scale: what the value is multiplied with.
      digits: decimals.
      signed: whether positive values carry a plus.
      better: which values are good; None if neither.
      meaning: one sentence for the reader.
    """

    name: str
    unit: str = ""
    scale: float = 1.0
    digits: int = 4
    signed: bool = False
    better: Better | None = None
    meaning: str = ""

    @property
    def heading(self) -> str:
        """Name with unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def text(self, value: float) -> str:
        """The value as printed; a dash if it is undefined."""
        if not math.isfinite(value):
            return MISSING
        rounded = round(value * self.scale, self.digits)
        sign = "+" if self.signed and rounded > 0 else ""
        # Adding 0.0 turns a negative zero into zero.
        return f"{sign}{rounded + 0.0:.{self.digits}f}"

    def spread(self, values: Sequence[float]) -> str:
        """Mean ± standard deviation (ddof=1) of the defined values, as printed.

        Where some are undefined, it ends in how many are not: `(2 of 3)`.
        """
        defined = [v for v in values if math.isfinite(v)]
        if not defined:
            return MISSING
        text = self.text(nan_mean(defined))
        if len(defined) > 1:
            deviation = float(np.std(defined, ddof=1)) * self.scale
            text += f" ± {deviation:.{self.digits}f}"
        if len(defined) < len(values):
            text += f" ({len(defined)} of {len(values)})"
        return text


METRICS: Mapping[str, Metric] = {
    "dice": Metric(
        name="Dice",
        better="higher",
        meaning="overlap of prediction and truth, 2|P∩T| / (|P|+|T|): the slices of a "
        "case are pooled, then the cases averaged; 1 is perfect",
    ),
    "iou": Metric(
        name="IoU",
        better="higher",
        meaning="intersection over union |P∩T| / |P∪T|, per case like Dice; stricter",
    ),
    "hd95": Metric(
        name="HD95",
        unit="px",
        digits=2,
        better="lower",
        meaning="how far the outlines are apart, leaving out the worst 5 %: the 95th "
        "percentile of the distances in both directions, per slice",
    ),
    "assd": Metric(
        name="ASSD",
        unit="px",
        digits=2,
        better="lower",
        meaning="how far the outlines are apart on average, per slice",
    ),
    "ravd": Metric(
        name="RAVD",
        signed=True,
        better="zero",
        meaning="relative volume difference (|P|-|T|) / |T| per case: positive if too "
        "much was marked, negative if too little",
    ),
    "accuracy": Metric(
        name="Top-1",
        unit="%",
        scale=100,
        digits=2,
        better="higher",
        meaning="share of images whose most probable class is right",
    ),
    "top5": Metric(
        name="Top-5",
        unit="%",
        scale=100,
        digits=2,
        better="higher",
        meaning="share of images whose class is among the five most probable",
    ),
    "macro_f1": Metric(
        name="Macro-F1",
        better="higher",
        meaning="F1 score averaged over the classes, however rare they are",
    ),
    "ece": Metric(
        name="ECE",
        better="lower",
        meaning="expected calibration error in 15 bins: how far confidence is from the "
        "share of right answers; 0 is honest",
    ),
    "nll": Metric(
        name="NLL",
        better="lower",
        meaning="mean negative log-probability of the true class, in nats",
    ),
}


def describe(key: str) -> Metric:
    """How to print the metric `key`; an unknown one gets four decimals.

    >>> describe("dice/liver").heading
    'Dice liver'
    """
    if key in METRICS:
        return METRICS[key]
    base, _, part = key.partition("/")
    if part and base in METRICS:
        metric = METRICS[base]
        return dataclasses.replace(
            metric, name=f"{metric.name} {part}", meaning=f"{metric.name} of {part!r}"
        )
    return Metric(name=key)
