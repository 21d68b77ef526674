"""What the page shows of predictions: slices with overlays, images, confusions.

Everything here turns arrays of `predictions.npz` into plain values for the template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxkd.report import pictures
from jaxkd.report.run import Run

GROUP_TITLES = {"best": "Best", "median": "Median", "worst": "Worst", "all": ""}
# Larger confusion matrices are a picture, not a table of numbers.
_LARGEST_TABLE = 12
_HEAT = (15, 138, 112)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SliceCell:
    """One picture of a row: the image, the truth, or a network's prediction.

    Attributes:
      title: name above the picture.
      caption: value below it.
      alt: the picture in words.
      style: number of the network's colour; None for image and truth.
      outlines: (path, number of the class) of true outlines.
      overlay: regions of the prediction, if it is one.
      whole: whether it shows the whole image although the row shows a detail.
    """

    title: str
    caption: str
    alt: str
    style: int | None = None
    outlines: tuple[tuple[str, int], ...] = ()
    overlay: pictures.Overlay | None = None
    whole: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SliceRow:
    """One slice: the image, the truth and the predictions.

    Attributes:
      key: for ids, unique on the page.
      group: `"Best"`, `"Median"`, `"Worst"` on the first row of a group, else empty.
      width: of the image in pixels.
      height: of the image in pixels.
      image: address of the whole image.
      detail: address of the shown part, if only a part is shown.
      box: the shown part: left, top, width, height.
      cells: the pictures from left to right.
    """

    key: str
    group: str
    width: int
    height: int
    image: str
    detail: str
    box: tuple[int, int, int, int]
    cells: tuple[SliceCell, ...]

    @property
    def zoomed(self) -> bool:
        """Whether the row shows a part of the slice."""
        return bool(self.detail)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a network says of an image.

    Attributes:
      network: who says it.
      style: number of the network's colour.
      name: the class it names.
      sureness: the probability it gives that class, as printed; empty if unknown.
      right: whether that is the true class.
    """

    network: str
    style: int
    name: str
    sureness: str
    right: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageCard:
    """A classified image with what each network says.

    Attributes:
      group: `"Best"`, `"Median"`, `"Worst"` on the first card of a group, else empty.
      title: which record it is.
      image: address of the picture.
      truth: name of the true class.
      answers: one per network.
    """

    group: str
    title: str
    image: str
    truth: str
    answers: tuple[Answer, ...]

    @property
    def alt(self) -> str:
        """The card in words."""
        said = ", ".join(f"{a.network} says {a.name}" for a in self.answers)
        return f"{self.title}: image of class {self.truth}; {said}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confusion:
    """A confusion matrix, as a table if it is small and as a picture if not.

    Attributes:
      network: whose it is.
      rows: class name and cells (count, share of the row, right) per true class;
        empty for a picture.
      image: address of the picture; empty for a table.
      worst: the most frequent confusions in words.
      alt: the matrix in words.
    """

    network: str
    rows: tuple[tuple[str, tuple[tuple[int, float, bool], ...]], ...]
    image: str
    worst: tuple[str, ...]
    alt: str


def slice_rows(run: Run, *, key: str, per_group: int) -> list[SliceRow]:
    """Slices with every network's prediction, chosen by the last network's Dice.

    Slices without true foreground say little and are left out if there are others.

    Args:
      run: a segmentation run with predictions.
      key: prefix of the rows' keys, unique on the page.
      per_group: how many of the best, the median and the worst.

    Returns:
      Rows from best to worst.
    """
    truth = run.predictions["truth"]
    networks = predicted_networks(run)
    with_target = np.flatnonzero((truth != 0).any(axis=(1, 2)))
    candidates = with_target if with_target.size else np.arange(len(truth))
    goal = run.predictions[f"prediction/{networks[-1]}"]
    scores = [pictures.slice_dice(goal[i], truth[i]) for i in candidates]
    rows, last = [], ""
    for pick in pictures.pick_by_score(scores, per_group=per_group):
        title = GROUP_TITLES[pick.group]
        record = int(candidates[pick.row])
        group = title if title != last else ""
        rows.append(_slice_row(run, networks, record, group, f"{key}-slice-{record}"))
        last = title
    return rows


def predicted_networks(run: Run) -> list[str]:
    """Networks that have predictions, in the order of the results."""
    return [name for name in run.networks if f"prediction/{name}" in run.predictions]


def class_name(run: Run, label: int) -> str:
    """The name of a class; its number if it has none."""
    names = run.summary.get("class_names", [])
    return str(names[label]) if 0 <= label < len(names) else str(label)


def _slice_row(
    run: Run, networks: Sequence[str], i: int, group: str, key: str
) -> SliceRow:
    truth, image = run.predictions["truth"][i], run.predictions["image"][i]
    predicted = {n: run.predictions[f"prediction/{n}"][i] for n in networks}
    height, width = truth.shape
    box = pictures.window([truth != 0, *(p != 0 for p in predicted.values())])
    zoomed = box != (0, 0, width, height)
    outlines = tuple(
        (pictures.region_path(truth == c), int(c)) for c in np.unique(truth) if c != 0
    )
    index = int(run.predictions["index"][i])
    cells = [
        SliceCell(
            title="image",
            caption=f"test record {index}",
            alt=f"Test record {index}: image",
            whole=True,
        ),
        SliceCell(
            title="truth",
            caption=", ".join(class_name(run, c) for _, c in outlines) or "empty",
            alt=f"Test record {index}: outline of the truth",
            outlines=outlines,
        ),
    ]
    for name in networks:
        overlay = pictures.overlay(predicted[name], truth)
        cells.append(
            SliceCell(
                title=name,
                caption=f"Dice {overlay.dice:.3f}",
                alt=f"Test record {index}, {name}: Dice {overlay.dice:.3f}, "
                f"{overlay.text}",
                style=run.networks.index(name),
                outlines=outlines,
                overlay=overlay,
            )
        )
    left, top, w, h = box
    part = image[top : top + h, left : left + w]
    return SliceRow(
        key=key,
        group=group,
        width=width,
        height=height,
        image=pictures.picture_uri(image),
        detail=pictures.picture_uri(part) if zoomed else "",
        box=box,
        cells=tuple(cells),
    )


def image_cards(run: Run, *, per_group: int) -> list[ImageCard]:
    """Classified images, chosen by how sure the last network is of the true class.

    Args:
      run: a classification run with predictions.
      per_group: how many of the best, the median and the worst.

    Returns:
      Cards from best to worst.
    """
    truth = run.predictions["truth"]
    networks = predicted_networks(run)
    goal = networks[-1]
    if f"probabilities/{goal}" in run.predictions:
        probabilities = run.predictions[f"probabilities/{goal}"]
        scores = probabilities[np.arange(len(truth)), truth]
    else:
        scores = run.predictions[f"prediction/{goal}"] == truth
    cards, last = [], ""
    for pick in pictures.pick_by_score(scores.tolist(), per_group=per_group):
        i, group = pick.row, GROUP_TITLES[pick.group]
        cards.append(
            ImageCard(
                group=group if group != last else "",
                title=f"test record {int(run.predictions['index'][i])}",
                image=pictures.picture_uri(run.predictions["image"][i]),
                truth=class_name(run, int(truth[i])),
                answers=tuple(_answer(run, name, i) for name in networks),
            )
        )
        last = group
    return cards


def _answer(run: Run, network: str, i: int) -> Answer:
    answer = int(run.predictions[f"prediction/{network}"][i])
    probabilities = run.predictions.get(f"probabilities/{network}")
    return Answer(
        network=network,
        style=run.networks.index(network),
        name=class_name(run, answer),
        sureness="" if probabilities is None else f"{probabilities[i, answer]:.0%}",
        right=answer == int(run.predictions["truth"][i]),
    )


def confusions(run: Run) -> list[Confusion]:
    """The confusion matrices of a run's networks.

    Args:
      run: a classification run.

    Returns:
      One per network that has a matrix stored.
    """
    return [
        _confusion(run, name, run.predictions[f"confusion/{name}"])
        for name in run.networks
        if f"confusion/{name}" in run.predictions
    ]


def _confusion(run: Run, network: str, counts: np.ndarray) -> Confusion:
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    names = [class_name(run, c) for c in range(len(counts))]
    wrong: Any = counts - np.diag(np.diagonal(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:5]
    pairs = [divmod(int(place), len(counts)) for place in order]
    worst = tuple(
        f"{names[t]} taken for {names[p]}: {counts[t, p]} of {totals[t, 0]}"
        for t, p in pairs
        if wrong[t, p]
    )
    right, total = int(np.trace(counts)), int(counts.sum())
    small = len(counts) <= _LARGEST_TABLE
    rows = tuple(
        (
            names[t],
            tuple(
                (int(counts[t, p]), float(shares[t, p]), t == p)
                for p in range(len(counts))
            ),
        )
        for t in range(len(counts) if small else 0)
    )
    return Confusion(
        network=network,
        rows=rows,
        image="" if small else pictures.heat_map_uri(shares, colour=_HEAT),
        worst=worst,
        alt=f"Confusion matrix of {network}: {right} of {total} right",
    )
