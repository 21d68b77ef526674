"""CIFAR pickles as published, and hostile ones."""

import os
import pickle
import struct

import numpy as np
import pytest

from jaxkd import data
from jaxkd.data.cifar import load_pickle


def python2_pickle(value):
    """The protocol-2 stream that Python 2 wrote for the CIFAR files.

    There, `str` is the opcode U or T (bytes), and an array rebuilds itself by
    `numpy.core.multiarray._reconstruct` with its bytes as a `str`.
    """
    return b"\x80\x02" + _encode(value) + b"."


def _encode(value):
    if isinstance(value, str):
        raw = value.encode("latin1")
        if len(raw) < 256:
            return b"U" + bytes([len(raw)]) + raw
        return b"T" + struct.pack("<i", len(raw)) + raw
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_encode, value)) + b"e"
    if isinstance(value, dict):
        items = b"".join(_encode(k) + _encode(v) for k, v in value.items())
        return b"}(" + items + b"u"
    assert isinstance(value, np.ndarray)
    shape = b"(" + b"".join(_encode(n) for n in value.shape) + b"t"
    build = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n("
    build += _encode(0) + b"t" + _encode("b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + _encode("u1") + _encode(0) + _encode(1) + b"tR"
    dtype += b"(" + _encode(3) + _encode("|") + b"NNN" + _encode(-1) + _encode(-1)
    dtype += _encode(0) + b"tb"
    raw = _encode(value.tobytes().decode("latin1"))
    return build + b"(" + _encode(1) + shape + dtype + b"\x89" + raw + b"tb"


@pytest.fixture
def folder(tmp_path):
    """Both data sets, four images per file; image i is i in red, i + 1 in green..."""
    ten = tmp_path / "cifar-10-batches-py"
    hundred = tmp_path / "cifar-100-python"
    for path in (ten, hundred):
        path.mkdir()

    def images(first):
        planes = np.arange(first, first + 4)[:, None] + np.arange(3)
        return np.repeat(planes, 1024, axis=1).astype(np.uint8)

    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        batch = {"data": images(10 * i), "labels": [i, 1, 2, 9], "batch_label": name}
        (ten / name).write_bytes(python2_pickle(batch))
    meta = {"label_names": [f"class {i}" for i in range(10)]}
    (ten / "batches.meta").write_bytes(python2_pickle(meta))
    for i, name in enumerate(("train", "test")):
        labels = {"fine_labels": [0, 99, 5, i], "coarse_labels": [0, 19, 5, i]}
        batch = {"data": images(10 * i), **labels}
        (hundred / name).write_bytes(python2_pickle(batch))
    meta = {
        "fine_label_names": [f"fine {i}" for i in range(100)],
        "coarse_label_names": [f"coarse {i}" for i in range(20)],
    }
    (hundred / "meta").write_bytes(python2_pickle(meta))
    return tmp_path


def test_the_fixture_is_what_python_reads_with_latin1(folder):
    path = folder / "cifar-10-batches-py" / "test_batch"
    theirs = pickle.loads(path.read_bytes(), encoding="latin1")
    ours = load_pickle(path)
    np.testing.assert_array_equal(ours["data"], theirs["data"])
    assert ours["labels"] == theirs["labels"]


@pytest.mark.parametrize("inside", [True, False])
def test_cifar10_is_read_from_its_folder_or_the_one_above(folder, inside):
    path = folder / "cifar-10-batches-py" if inside else folder
    train = data.load("cifar10", split="train", path=path)
    test = data.load("cifar10", split="test", path=path)
    assert (len(train), len(test)) == (20, 4)
    assert train.info.image_shape == (32, 32, 3)
    assert train.info.class_names[3] == "class 3"
    # Files in order, planes to channels.
    np.testing.assert_array_equal(train[5]["image"][0, 0], [11, 12, 13])
    assert int(train[8]["label"]) == 2
    np.testing.assert_array_equal(test[0]["image"][31, 31], [50, 51, 52])


def test_cifar100_has_fine_and_coarse_labels(folder):
    fine = data.load("cifar100", split="test", path=folder)
    coarse = data.load("cifar100", split="test", path=folder, labels="coarse")
    assert (fine.info.num_classes, coarse.info.num_classes) == (100, 20)
    assert [int(fine[1]["label"]), int(coarse[1]["label"])] == [99, 19]
    assert coarse.info.class_names[19] == "coarse 19"


def test_pickles_of_python_3_are_read_at_every_protocol(tmp_path):
    value = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": b"\xff", "s": "x"}
    for protocol in range(5):
        path = tmp_path / str(protocol)
        path.write_bytes(pickle.dumps(value, protocol=protocol))
        read = load_pickle(path)
        np.testing.assert_array_equal(read["data"], value["data"])
        assert (read["b"], read["s"]) == (b"\xff", "x")


class Runs:
    """Pickles to a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("kind", ["system", "eval", "getattr", "open", "codec"])
def test_hostile_pickles_are_refused_and_run_nothing(folder, tmp_path, kind, protocol):
    target = tmp_path / "was_here"
    payload = {
        "system": Runs(os.system, f"touch {target}"),
        "eval": Runs(eval, f"open({str(target)!r}, 'w')"),
        "getattr": Runs(getattr, 1, "real"),
        "open": Runs(open, str(target), "w"),
        "codec": Runs(__import__("codecs").encode, "x", "rot13"),
    }[kind]
    path = folder / "cifar-10-batches-py" / "test_batch"
    batch = {"data": payload, "labels": []}
    path.write_bytes(pickle.dumps(batch, protocol=protocol))
    message = "codec 'rot13' is not allowed" if kind == "codec" else "asks for"
    with pytest.raises(data.DamagedFileError, match=f"test_batch: .*{message}"):
        data.load("cifar10", split="test", path=folder)
    assert not target.exists()


def test_dotted_names_do_not_reach_further(tmp_path):
    # Protocol 4 lets a name walk through attributes: numpy "ndarray.tofile".
    stream = b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."
    (tmp_path / "a").write_bytes(stream)
    with pytest.raises(data.DamagedFileError, match="asks for numpy.ndarray.tofile"):
        load_pickle(tmp_path / "a")


@pytest.mark.parametrize("kind", ["O", "V8", "S4", "i8,i8", "u1\n"])
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, kind):
    stream = python2_pickle({"data": np.zeros((1, 4), np.uint8)})
    stream = stream.replace(b"U\x02u1", b"U" + bytes([len(kind)]) + kind.encode())
    (tmp_path / "a").write_bytes(stream)
    with pytest.raises(data.DamagedFileError, match="arrays of type .* not allowed"):
        load_pickle(tmp_path / "a")


def test_arrays_keep_type_byte_order_and_layout(tmp_path):
    for array in (
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype="<f8").reshape(2, 3)),
        np.array([True, False]),
        np.array(7, np.int64),
    ):
        (tmp_path / "a").write_bytes(pickle.dumps({"x": array}, protocol=2))
        read = load_pickle(tmp_path / "a")["x"]
        np.testing.assert_array_equal(read, array)
        assert read.dtype == array.dtype


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_pickles_are_named(folder, share):
    path = folder / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(data.DamagedFileError, match="train"):
        data.load("cifar100", split="train", path=folder)


def test_spoiled_bytes_never_crash_or_raise_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    whole = bytearray(python2_pickle({"data": np.zeros((1, 4), np.uint8), "n": [1, 2]}))
    for _ in range(400):
        spoiled = bytearray(whole)
        for position in rng.integers(0, len(whole), 3):
            spoiled[position] = rng.integers(0, 256)
        (tmp_path / "a").write_bytes(bytes(spoiled))
        try:
            load_pickle(tmp_path / "a")
        except data.DamagedFileError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "does not hold a dictionary"),
        ({"labels": [0]}, r"'data' is not bytes of \[n, 3072\]"),
        ({"data": np.zeros((1, 9), np.uint8), "labels": [0]}, "'data' is not bytes"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "is not 2 numbers"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, "numbers below 10"),
    ],
)
def test_other_contents_are_refused(folder, content, message):
    path = folder / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(python2_pickle(content))
    with pytest.raises(data.DamagedFileError, match=f"test_batch: .*{message}"):
        data.load("cifar10", split="test", path=folder)


def test_missing_files_are_named(folder):
    (folder / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="no file .*data_batch_4"):
        data.load("cifar10", split="train", path=folder)
    (folder / "cifar-100-python" / "meta").write_bytes(python2_pickle({"x": 1}))
    with pytest.raises(data.DamagedFileError, match="meta: .* is not 100 names"):
        data.load("cifar100", split="train", path=folder)
