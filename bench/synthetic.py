"""Synthetic data for the measurements: random pixels in the shapes of real sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CIFAR = "synthetic, uint8 32x32x3, 100 classes"


def write_cifar(path: Path, *, train: int, test: int, classes: int = 100) -> Path:
    """Writes a `.npz` file of random uint8 images `[n, 32, 32, 3]` with labels.

    Args:
      path: the file.
      train: records of the training split.
      test: records of the test split.
      classes: number of classes; both splits have the first and the last one.
    """
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        labels = rng.integers(classes, size=count, dtype=np.int32)
        labels[:2] = 0, classes - 1
        arrays[f"{split}_labels"] = labels
        shape = (count, 32, 32, 3)
        arrays[f"{split}_images"] = rng.integers(256, size=shape, dtype=np.uint8)
    np.savez(path, **arrays)
    return path


def reading(path: Path) -> dict[str, Any]:
    """What a config says to read a file of `write_cifar`."""
    return {"data.source": "npz", "data.path": path}


def teaching(path: Path) -> dict[str, Any]:
    """As `reading`, and only the student is trained, by a teacher that nobody was."""
    return {**reading(path), "networks.teacher.frozen": True, "run": ("student",)}


def photograph(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A random image that takes about as many bytes as a photograph does in JPEG.

    Coarse random patches, interpolated, under a little noise: plain noise would take
    three times as many bytes, and time to decode.
    """
    coarse = rng.integers(256, size=(height // 16 + 1, width // 16 + 1, 3))
    smooth = Image.fromarray(coarse.astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.normal(0, 8, size=(height, width, 1))
    pixels = np.clip(np.asarray(smooth) + noise, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def write_photographs(
    folder: Path, *, count: int, height: int, width: int, classes: int = 2
) -> list[Path]:
    """Writes JPEG files `FOLDER/train/CLASS/NUMBER.jpg`, and one per class to test.

    Returns:
      The files of the training split.
    """
    rng = np.random.default_rng(0)
    files = []
    for split, images in (("train", count), ("test", classes)):
        for i in range(images):
            file = folder / split / f"class{i % classes}" / f"{i:05}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            photograph(rng, height, width).save(file, quality=90)
            if split == "train":
                files.append(file)
    return files
