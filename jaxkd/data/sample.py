"""The shipped sample: real CT slices of the liver, so that a demo needs no download."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from jaxkd.data.arrays import ArraySource
from jaxkd.data.registry import register
from jaxkd.data.source import Split, check_split

_FOLDER = Path(__file__).parent / "samples" / "liver_ct"


@register()
def liver_ct_sample(*, split: Split, image_size: int = 128) -> ArraySource:
    """Axial CT slices with the liver outlined, split by volume, in memory.

    The files are windowed to 8 bit, 256x256, and stored upside down or mirrored; both
    are undone here, so that all slices lie the same way. Groups are volumes.

    Args:
      split: "train" (30 volumes, 160 slices) or "test" (8 volumes, 53 slices).
      image_size: height and width; images bilinear and antialiased, masks nearest.

    Returns:
      A segmentation source, images uint8 with one channel, classes background and
      liver.

    Reference:
      P. Bilic et al., "The Liver Tumor Segmentation Benchmark (LiTS)", Medical Image
      Analysis, 2023; M. Antonelli et al., "The Medical Segmentation Decathlon", Nature
      Communications, 2022. Licence CC BY-SA 4.0, see ATTRIBUTION.md beside the files.
    """
    check_split(split)
    with open(_FOLDER / "index.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    images, masks = [], []
    for row in rows:
        # Grey values are stored as equal red, green and blue.
        with Image.open(_FOLDER / "images" / f"{row['name']}.jpg") as image:
            pixels = np.asarray(image.convert("L"))
        with Image.open(_FOLDER / "masks" / f"{row['name']}.png") as mask:
            labels = np.asarray(mask)
        images.append(upright(pixels, row["transform"]))
        masks.append(upright(labels, row["transform"]))
    return ArraySource(
        "liver_ct_sample",
        np.stack(images),
        np.stack(masks),
        class_names=("background", "liver"),
        groups=[row["volume"] for row in rows],
        image_size=image_size,
    )


def upright(pixels: np.ndarray, transform: str) -> np.ndarray:
    """Undoes how a slice is stored.

    Args:
      pixels: `[h, w]`.
      transform: "flipped" (upside down) or "mirrored" (left-right).

    Raises:
      ValueError: another transform.
    """
    if transform == "flipped":
        return pixels[::-1]
    if transform == "mirrored":
        return pixels[:, ::-1]
    raise ValueError(f"transform must be 'flipped' or 'mirrored', got {transform!r}")
