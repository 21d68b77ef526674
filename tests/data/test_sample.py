"""The shipped liver sample: what it holds, and that it lies as it should."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxkd
from jaxkd import data
from jaxkd.data.sample import upright

FOLDER = Path(jaxkd.__file__).parent / "data" / "samples" / "liver_ct"


@pytest.fixture(scope="module")
def splits():
    return {
        split: data.load("liver_ct_sample", split=split) for split in ("train", "test")
    }


@pytest.fixture(scope="module")
def rows():
    with open(FOLDER / "index.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_it_has_the_promised_size(splits, rows):
    assert {split: len(source) for split, source in splits.items()} == {
        "train": 160,
        "test": 53,
    }
    assert {s: len(set(source.groups)) for s, source in splits.items()} == {
        "train": 30,
        "test": 8,
    }
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 3_000_000
    assert len(files) == 2 * len(rows) + 3


def test_no_volume_is_on_both_sides_and_no_slice_there_twice(splits, rows):
    assert not set(splits["train"].groups) & set(splits["test"].groups)
    slices = [(row["volume"], row["slice"]) for row in rows]
    assert len(set(slices)) == len(slices)
    contents = [
        hashlib.sha256((FOLDER / "images" / f"{row['name']}.jpg").read_bytes()).digest()
        for row in rows
    ]
    assert len(set(contents)) == len(contents)


def test_files_and_index_agree(rows):
    names = {row["name"] for row in rows}
    assert {file.stem for file in (FOLDER / "images").iterdir()} == names
    assert {file.stem for file in (FOLDER / "masks").iterdir()} == names
    for row in rows:
        with Image.open(FOLDER / "masks" / f"{row['name']}.png") as mask:
            pixels = np.asarray(mask)
        assert set(np.unique(pixels)) <= {0, 1}
        assert pixels.sum() == int(row["liver_pixels"])
        assert row["transform"] == row["name"].partition("_")[0]


def test_records_are_small_grey_slices_with_binary_masks(splits):
    for source in splits.values():
        assert source.info.task == "segmentation"
        assert source.info.class_names == ("background", "liver")
        assert source.info.image_shape == (128, 128, 1)
        batch = source.take(np.arange(len(source)))
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        assert set(np.unique(batch["label"])) == {0, 1}
        assert 0.05 < batch["label"].mean() < 0.09


def test_most_slices_show_the_liver(splits):
    for source in splits.values():
        shares = source.take(np.arange(len(source)))["label"].mean((1, 2))
        assert np.mean(shares > 0.01) > 0.7
        assert shares.max() > 0.15


def test_all_slices_lie_the_same_way(splits, rows):
    """The liver is on one side of the body, the spine on another, in every volume.

    Were one of the two transforms not undone, the centre of the liver would lie in
    the upper or in the right half for half of the volumes.
    """
    heights, widths = np.mgrid[:128, :128]
    by_transform = {"flipped": [], "mirrored": []}
    for split, source in splits.items():
        of_split = [row for row in rows if row["split"] == split]
        for i, row in enumerate(of_split):
            label = source[i]["label"]
            if label.mean() > 0.05:
                centre = (heights * label).sum() / label.sum()
                by_transform[row["transform"]].append(
                    (centre, (widths * label).sum() / label.sum())
                )
    flipped, mirrored = (np.array(by_transform[k]) for k in ("flipped", "mirrored"))
    assert min(len(flipped), len(mirrored)) > 30
    for centres in (flipped, mirrored):
        assert np.mean(centres[:, 0] > 64) > 0.95
        assert np.mean(centres[:, 1] > 50) > 0.95
    np.testing.assert_allclose(flipped.mean(0), mirrored.mean(0), atol=6)


def test_other_sizes(rows):
    source = data.load("liver_ct_sample", split="test", image_size=256)
    assert source.info.image_shape == (256, 256, 1)
    row = [row for row in rows if row["split"] == "test"][7]
    assert source[7]["label"].sum() == int(row["liver_pixels"])
    with Image.open(FOLDER / "images" / f"{row['name']}.jpg") as image:
        stored = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(
        source[7]["image"][..., 0], upright(stored, row["transform"])
    )


def test_transforms_are_undone():
    pixels = np.array([[1, 2], [3, 4]])
    np.testing.assert_array_equal(upright(pixels, "flipped"), [[3, 4], [1, 2]])
    np.testing.assert_array_equal(upright(pixels, "mirrored"), [[2, 1], [4, 3]])
    with pytest.raises(ValueError, match="'flipped' or 'mirrored', got 'turned'"):
        upright(pixels, "turned")


def test_licence_and_attribution_are_beside_the_files():
    licence = (FOLDER / "LICENSE").read_text()
    attribution = (FOLDER / "ATTRIBUTION.md").read_text()
    for text in (licence, attribution):
        assert "CC BY-SA 4.0" in text
        assert "https://creativecommons.org/licenses/by-sa/4.0/legalcode" in text
    for name in ("Bilic", "Antonelli", "sarah-antillia/Image-Segmentation-Liver-Tumor"):
        assert name in attribution
