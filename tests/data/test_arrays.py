"""Arrays in memory, npz files, digits."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from jaxkd import data
from jaxkd.data.arrays import ArraySource


def make(n=6, **options):
    images = np.arange(n * 12, dtype=np.uint8).reshape(n, 3, 4)
    return ArraySource("numbers", images, np.arange(n) % 2, **options)


def test_records_have_the_promised_form():
    source = make()
    assert len(source) == 6
    assert source.info.task == "classification"
    assert source.info.image_shape == (3, 4, 1)
    assert source.info.class_names == ("0", "1")
    assert source.info.num_classes == 2
    assert isinstance(source, data.Source)
    record = source[3]
    assert record["image"].dtype == np.uint8
    assert record["label"].dtype == np.int32
    assert record["label"].shape == ()
    assert record["label"] == 1


def test_taking_many_equals_taking_one_by_one():
    source = make()
    many = source.take(np.array([4, 0, 4]))
    for row, index in enumerate((4, 0, 4)):
        for name, value in source[index].items():
            np.testing.assert_array_equal(many[name][row], value)


def test_dense_labels_make_a_segmentation_source_and_are_resized_alike():
    images = np.zeros((2, 8, 8, 3), np.float64)
    labels = np.zeros((2, 8, 8), np.uint8)
    images[:, :4], labels[:, :4] = 1, 2
    source = ArraySource(
        "halves", images, labels, class_names=("a", "b", "c"), image_size=4
    )
    assert source.info.task == "segmentation"
    assert source.info.image_shape == (4, 4, 3)
    record = source[0]
    assert record["image"].dtype == np.float32
    np.testing.assert_array_equal(record["label"][:, 0], [2, 2, 0, 0])
    np.testing.assert_allclose(record["image"][:, 0, 0], [1, 0.875, 0.125, 0])


def test_a_selection_keeps_groups_and_classes():
    source = make(groups=list("aabbcc")).select(np.array([5, 0]))
    assert source.groups == ("c", "a")
    assert source.info.class_names == ("0", "1")
    assert source[0]["image"][0, 0, 0] == 60


def test_arrays_by_name_and_by_pickle():
    images = np.zeros((3, 2, 2, 1), np.float32)
    source = data.load(
        "arrays", split="test", images=images, labels=np.array([[0], [1], [2]])
    )
    assert source.info.num_classes == 3
    assert pickle.loads(pickle.dumps(source))[2]["label"] == 2


@pytest.mark.parametrize(
    ("images", "labels", "options", "error", "message"),
    [
        (np.zeros((2, 3)), [0, 1], {}, ValueError, r"must be \[n, h, w, c\]"),
        (np.zeros((0, 3, 3)), [], {}, ValueError, "n >= 1"),
        (np.zeros((2, 3, 3), int), [0, 1], {}, TypeError, "uint8 or float, got int64"),
        (np.zeros((2, 3, 3)), [0.0, 1.0], {}, TypeError, "labels must be integers"),
        (np.zeros((2, 3, 3)), [0, 1, 1], {}, ValueError, r"labels must be \(2,\) or"),
        (np.zeros((2, 3, 3)), [0, -1], {}, ValueError, "labels run from -1 to 0"),
        (
            np.zeros((2, 3, 3)),
            [0, 2],
            dict(class_names=("a", "b")),
            ValueError,
            "labels run from 0 to 2 but there are 2 classes",
        ),
        (np.zeros((2, 3, 3)), [0, 1], dict(groups=["a"]), ValueError, "1 groups given"),
    ],
)
def test_what_does_not_fit_is_refused(images, labels, options, error, message):
    labels = np.asarray(labels)
    labels = labels.astype(int) if not len(labels) else labels
    with pytest.raises(error, match=message):
        ArraySource("bad", images, labels, **options)


def test_npz_in_the_layout_of_medmnist(tmp_path):
    path = tmp_path / "set.npz"
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 5), ("test", 2)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 4, 4), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n)[:, None]
    np.savez(path, **arrays)
    train = data.load("npz", split="train", path=path)
    assert (len(train), train.info.image_shape) == (5, (4, 4, 1))
    np.testing.assert_array_equal(train[4]["image"][..., 0], arrays["train_images"][4])
    # The classes are those of both splits, though test has labels 0 and 1 alone.
    test = data.load("npz", split="test", path=path)
    assert test.info.class_names == train.info.class_names == tuple("01234")


def test_npz_keys_may_be_given(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(
        path,
        x_train=np.zeros((3, 2, 2), np.uint8),
        y_train=np.arange(3),
        other=np.ones((3, 2, 2), np.uint8),
        patient=np.array(["p", "q", "p"]),
    )
    options = dict(split="train", path=path, group_key="patient")
    assert data.load("npz", **options).groups == ("p", "q", "p")
    source = data.load("npz", image_key="other", label_key="y_{split}", **options)
    assert source[0]["image"].max() == 1
    with pytest.raises(KeyError, match="no array test_images or x_test; it has x_tr"):
        data.load("npz", split="test", path=path)
    with pytest.raises(KeyError, match="no array photos"):
        data.load("npz", image_key="photos", **options)


def test_object_arrays_in_npz_are_refused_and_run_nothing(tmp_path):
    target = tmp_path / "was_here"

    class Hostile:
        def __reduce__(self):
            return target.write_text, ("x",)

    np.savez(
        tmp_path / "set.npz",
        train_images=np.zeros((1, 2, 2), np.uint8),
        train_labels=np.array([Hostile()], dtype=object),
    )
    target.unlink(missing_ok=True)
    with pytest.raises(ValueError, match="'train_labels' of .*set.npz holds Python"):
        data.load("npz", split="train", path=tmp_path / "set.npz")
    assert not target.exists()


def test_damaged_npz_files_are_named(tmp_path):
    path = tmp_path / "set.npz"
    path.write_text("not an archive")
    with pytest.raises(data.DamagedFileError, match="set.npz: not a readable .npz"):
        data.load("npz", split="train", path=path)
    rng = np.random.default_rng(0)
    np.savez(path, train_images=rng.random((40, 8, 8)), train_labels=np.zeros(40, int))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(data.DamagedFileError, match="set.npz"):
        data.load("npz", split="train", path=path)
    # A flipped byte inside an array breaks its checksum.
    broken = bytearray(whole)
    broken[5000] ^= 0xFF
    path.write_bytes(bytes(broken))
    with pytest.raises(data.DamagedFileError, match="set.npz: array 'train_images'"):
        data.load("npz", split="train", path=path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(data.DamagedFileError, match="a single array"):
        data.load("npz", split="train", path=tmp_path / "one.npy")


def header_of(shape):
    content = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, header)
    return content.getvalue()


def test_arrays_larger_than_their_file_are_refused(tmp_path):
    path = tmp_path / "set.npz"
    for shape in ((10**13,), (3, 2, 2)):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("train_images.npy", header_of(shape))
        with pytest.raises(data.DamagedFileError, match="set.npz: .* announces"):
            data.load("npz", split="train", path=path)
    path.write_bytes(header_of((10**13,)))
    with pytest.raises(data.DamagedFileError, match="set.npz: not a readable .npz"):
        data.load("npz", split="train", path=path)


@pytest.mark.parametrize("name", ["train_images", "train_images.npy"])
def test_members_that_are_no_arrays_are_refused(tmp_path, name):
    path = tmp_path / "set.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "text")
    with pytest.raises(data.DamagedFileError, match="'train_images' is not an array"):
        data.load("npz", split="train", path=path)


def test_digits_are_split_once_and_for_all():
    train = data.load("digits", split="train")
    test = data.load("digits", split="test")
    assert (len(train), len(test)) == (1438, 359)
    assert not set(train.groups) & set(test.groups)
    assert train.info.num_classes == 10
    assert train.info.image_shape == (8, 8, 1)
    image = train[0]["image"]
    assert image.dtype == np.float32
    assert 0 <= image.min() < image.max() <= 1
    assert np.bincount([int(test[i]["label"]) for i in range(359)]).min() > 20
    resized = data.load("digits", split="test", image_size=16)
    assert resized.info.image_shape == (16, 16, 1)
