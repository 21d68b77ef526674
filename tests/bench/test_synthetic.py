"""Synthetic data have the shapes of real sets."""

import numpy as np
import pytest
from PIL import Image

from jaxkd import data


@pytest.fixture(scope="module")
def synthetic(script):
    return script("synthetic")


def test_a_source_reads_the_synthetic_cifar(synthetic, tmp_path):
    path = synthetic.write_cifar(tmp_path / "a.npz", train=6, test=4, classes=100)
    train = data.load("npz", split="train", path=path)
    test = data.load("npz", split="test", path=path)
    assert (len(train), len(test)) == (6, 4)
    assert train.info.image_shape == (32, 32, 3)
    assert train.info.num_classes == test.info.num_classes == 100
    assert train[0]["image"].dtype == np.uint8
    assert not np.array_equal(train[0]["image"], test[0]["image"])


def test_photographs_take_about_as_many_bytes_as_real_ones(synthetic, tmp_path):
    files = synthetic.write_photographs(tmp_path, count=3, height=96, width=128)
    assert [file.name for file in files] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    with Image.open(files[0]) as image:
        assert (image.format, image.size) == ("JPEG", (128, 96))
    # Between flat areas and plain noise, at this quality.
    assert 1 < 8 * files[0].stat().st_size / (96 * 128) < 6
    source = data.load("image_folder", split="train", path=tmp_path, image_size=16)
    assert len(source) == 3
    assert source.info.class_names == ("class0", "class1")
