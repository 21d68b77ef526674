"""Pictures of predictions: outlines and error regions as vectors over the image.

A slice's image is embedded once as a picture; outlines and the regions that a network
found, invented or missed are vector paths on top of it. They are sharp at any size,
small in bytes, and can carry a pattern besides a colour.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from jaxkd.metrics import segmentation

# Longest side of an embedded picture; larger images are shrunk to it.
MAX_SIDE = 256


@dataclasses.dataclass(frozen=True)
class Overlay:
    """A network's prediction on one slice against the truth.

    Attributes:
      right: path of the foreground that was found with its class.
      invented: path of the background that was taken for foreground.
      missed: path of the foreground that was taken for background.
      confused: path of the foreground that was taken for another foreground class.
      pixels: how many pixels each of these has, in this order.
      dice: Dice of the slice; with several foreground classes the mean over those that
        truth or prediction holds.
    """

    right: str
    invented: str
    missed: str
    confused: str
    pixels: tuple[int, int, int, int]
    dice: float

    @property
    def text(self) -> str:
        """The overlay in words."""
        right, invented, missed, confused = self.pixels
        words = f"{right} pixels right, {invented} false positive, {missed} missed"
        return words + (f", {confused} of a wrong class" if confused else "")


@dataclasses.dataclass(frozen=True)
class Pick:
    """A record chosen for display and why.

    Attributes:
      row: its position in the predictions.
      group: `"best"`, `"median"`, `"worst"`; `"all"` if there are too few to choose.
    """

    row: int
    group: Literal["best", "median", "worst", "all"]


def slice_dice(pred: np.ndarray, truth: np.ndarray) -> float:
    """Dice of one slice of classes; class 0 is background.

    Args:
      pred: predicted classes, integer `[height, width]`.
      truth: true classes, integer `[height, width]`.

    Returns:
      The mean over the foreground classes that truth or prediction holds; 1 if there
      are none.
    """
    present = np.union1d(pred, truth)
    scores = [segmentation.dice(pred == c, truth == c) for c in present if c != 0]
    return float(np.mean(scores)) if scores else 1.0


def overlay(pred: np.ndarray, truth: np.ndarray) -> Overlay:
    """Compares a prediction with the truth, pixel by pixel.

    Args:
      pred: predicted classes, integer `[height, width]`.
      truth: true classes, integer `[height, width]`.

    Returns:
      Paths in pixel coordinates, counts and the slice's Dice.
    """
    found, real = pred != 0, truth != 0
    regions = (
        real & (pred == truth),
        found & ~real,
        real & ~found,
        found & real & (pred != truth),
    )
    right, invented, missed, confused = map(region_path, regions)
    sizes = [int(region.sum()) for region in regions]
    return Overlay(
        right,
        invented,
        missed,
        confused,
        (sizes[0], sizes[1], sizes[2], sizes[3]),
        slice_dice(pred, truth),
    )


def region_path(mask: np.ndarray) -> str:
    """The outline of a mask as the data of an SVG path, filled by the even-odd rule.

    The outline runs halfway between the centres of pixels inside and outside, with
    cut corners. Pixel (row, column) has its centre at (column + 0.5, row + 0.5).

    Args:
      mask: bool `[height, width]`.

    Returns:
      Path data; empty for an empty mask.
    """
    import contourpy

    if not mask.any():
        return ""
    padded = np.pad(mask, 1).astype(np.float64)
    lines = contourpy.contour_generator(z=padded).lines(0.5)
    parts = []
    for line in lines:
        # Undo the padding and move from pixel centres to pixel corners.
        points = _without_straight_points(np.asarray(line)[:-1] - 0.5)
        parts.append("M" + "L".join(f"{x:g} {y:g}" for x, y in points) + "Z")
    return "".join(parts)


def _without_straight_points(points: np.ndarray) -> np.ndarray:
    """A closed outline without the points that lie on straight lines."""
    before, after = np.roll(points, 1, axis=0), np.roll(points, -1, axis=0)
    (ax, ay), (bx, by) = (points - before).T, (after - points).T
    corner = ax * by - ay * bx != 0
    return points[corner]


def window(
    masks: Sequence[np.ndarray], *, smallest: int = 48, margin: float = 0.25
) -> tuple[int, int, int, int]:
    """The part of a slice worth looking at.

    Small targets are shown enlarged: the window holds all masks with some space, and
    keeps the proportions of the slice. If it would be more than 70 % of the slice, it
    is all of it.

    Args:
      masks: bool `[height, width]` each, truth and predictions.
      smallest: the window's longer side is at least so many pixels, and at least a
        quarter of the slice.
      margin: space on each side of the masks, as a part of their size.

    Returns:
      Left, top, width and height in pixels.
    """
    union = np.any(masks, axis=0)
    height, width = union.shape
    if not union.any():
        return 0, 0, width, height
    rows, columns = segmentation.bounding_box(union)
    part = max(
        (rows.stop - rows.start) / height, (columns.stop - columns.start) / width
    )
    part = max(part * (1 + 2 * margin), 0.25, smallest / max(height, width))
    if part > 0.7:
        return 0, 0, width, height
    w, h = round(width * part), round(height * part)
    left = (columns.start + columns.stop - w) // 2
    top = (rows.start + rows.stop - h) // 2
    return max(0, min(left, width - w)), max(0, min(top, height - h)), w, h


def pick_by_score(scores: Sequence[float], *, per_group: int = 3) -> list[Pick]:
    """The best, the median and the worst records.

    Args:
      scores: one per record, higher is better.
      per_group: how many of each.

    Returns:
      Picks from best to worst without repetition; all records, as one group, if there
      are no more than would be picked.
    """
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable").tolist()
    if len(order) <= 3 * per_group:
        return [Pick(row, "all") for row in order]
    start = (len(order) - per_group) // 2
    return [
        *(Pick(row, "best") for row in order[:per_group]),
        *(Pick(row, "median") for row in order[start : start + per_group]),
        *(Pick(row, "worst") for row in order[-per_group:]),
    ]


def picture_uri(image: np.ndarray) -> str:
    """An image as a `data:` address.

    Grey and small images are kept exactly (PNG); larger colour images, which would be
    heavy, are JPEG of high quality. Images above `MAX_SIDE` are shrunk.

    Args:
      image: uint8 `[height, width]` or `[height, width, 3]`.

    Returns:
      A `data:image/...;base64,` address.
    """
    picture = Image.fromarray(image)
    longest = max(picture.size)
    if longest > MAX_SIDE:
        scale = MAX_SIDE / longest
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    if image.ndim == 2 or longest <= 64:
        return _data_uri(picture, "png", optimize=True)
    return _data_uri(picture, "jpeg", quality=90, subsampling=0)


def heat_map_uri(shares: np.ndarray, *, colour: tuple[int, int, int]) -> str:
    """Values from 0 to 1 as a picture from transparent to a colour.

    Args:
      shares: float `[rows, columns]`, in [0, 1].
      colour: red, green, blue at 1.

    Returns:
      A `data:image/png;base64,` address; every value is a square of whole pixels.
    """
    # The square root keeps rare confusions visible beside a strong diagonal.
    alpha = np.round(255 * np.sqrt(np.clip(shares, 0, 1))).astype(np.uint8)
    pixels = np.empty((*shares.shape, 4), np.uint8)
    pixels[..., :3] = colour
    pixels[..., 3] = alpha
    factor = max(1, 480 // max(shares.shape))
    picture = Image.fromarray(pixels.repeat(factor, 0).repeat(factor, 1))
    return _data_uri(picture, "png", optimize=True)


def _data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
