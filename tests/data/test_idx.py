"""The idx files of the MNIST family."""

import gzip
import struct

import numpy as np
import pytest

from jaxkd import data
from jaxkd.data.idx import read_idx


def encode(array, code=0x08):
    header = struct.pack(">BBBB", 0, 0, code, array.ndim)
    header += struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 12), ("t10k", 4)):
        images = rng.integers(0, 256, (n, 5, 6), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(encode(images))
        with gzip.open(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(encode(labels))
    return tmp_path


def test_plain_and_gzipped_files_are_read(folder):
    train = data.load("idx", split="train", path=folder)
    test = data.load("idx", split="test", path=folder)
    assert (len(train), len(test)) == (12, 4)
    assert train.info.image_shape == (5, 6, 1)
    assert train.info.class_names == tuple("0123456789")
    assert [int(train[i]["label"]) for i in range(12)] == [i % 10 for i in range(12)]
    raw = (folder / "t10k-images-idx3-ubyte").read_bytes()
    assert test[0]["image"].tobytes() == raw[16 : 16 + 30]
    names = ["boot"] * 10
    named = data.load("idx", split="test", path=folder, class_names=names, image_size=8)
    assert named.info.class_names == tuple(names)
    assert named.info.image_shape == (8, 8, 1)


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(0x09, "i1"), (0x0B, "i2"), (0x0C, "i4"), (0x0D, "f4"), (0x0E, "f8")],
)
def test_all_types_of_the_format_are_decoded_big_endian(tmp_path, code, dtype):
    array = np.array([[-2, 3, 100]], dtype)
    (tmp_path / "a").write_bytes(encode(array, code))
    decoded = read_idx(tmp_path / "a")
    np.testing.assert_array_equal(decoded, array)
    assert decoded.dtype == np.dtype(dtype)


@pytest.mark.parametrize("cut", [0, 3, 10, 40, -1])
def test_truncated_files_are_named(folder, cut):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(data.DamagedFileError, match="train-images-idx3-ubyte"):
        data.load("idx", split="train", path=folder)


def test_truncated_gzip_and_foreign_files_are_named(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(data.DamagedFileError, match="labels.*cannot be read"):
        data.load("idx", split="train", path=folder)
    path.write_text("not gzip")
    with pytest.raises(data.DamagedFileError, match="labels.*cannot be read"):
        data.load("idx", split="train", path=folder)


def test_disagreeing_files_are_refused(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(encode(np.zeros(11, np.uint8)))
    with pytest.raises(data.DamagedFileError, match=r"labels of shape \(11,\) for 12"):
        data.load("idx", split="train", path=folder)
    (folder / "t10k-images-idx3-ubyte").write_bytes(encode(np.zeros(4, np.uint8)))
    with pytest.raises(data.DamagedFileError, match="three-dimensional byte array"):
        data.load("idx", split="test", path=folder)


def test_a_missing_file_is_named(folder):
    (folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="neither t10k-images-idx3-ubyte nor"):
        data.load("idx", split="test", path=folder)
