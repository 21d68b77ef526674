"""Stored regions: made by a teacher, written, read, and chosen for training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import data
from jaxkd.data.arrays import ArraySource
from jaxkd.data.regions import region_fields, stream_regions
from jaxkd.numerics import recover_labels

CLASSES, RECORDS, REGIONS = 4, 5, 6
FORMAT = "marginal_smoothing_k2"


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    return ArraySource(
        "small",
        rng.integers(0, 256, (RECORDS, 12, 10, 3)).astype(np.uint8),
        rng.integers(0, CLASSES, RECORDS),
        class_names=[str(i) for i in range(CLASSES)],
    )


def predict(images):
    """A teacher that looks at colours and at left and right."""
    x = images.astype(jnp.float32) / 64
    left, right = x[:, :, :4].mean((1, 2)), x[:, :, 4:].mean((1, 2))
    return jnp.concatenate([left, right[:, :1] - left[:, 1:2]], axis=-1)


def store(source, **options):
    options = {
        "regions": REGIONS,
        "key": jax.random.key(0),
        "image_size": (8, 8),
        "label_format": FORMAT,
        "batch_size": 4,
        **options,
    }
    return data.store_regions(source, predict, **options)


@pytest.fixture(scope="module")
def regions(source):
    return store(source)


def batch_of(source, indices):
    indices = np.asarray(indices)
    arrays = {**source.take(indices), "index": indices.astype(np.int32)}
    return {name: jnp.asarray(array) for name, array in arrays.items()}


@functools.partial(jax.jit, static_argnames="crops")
def choose(batch, *, key=None, epoch=0, crops=3):
    return data.choose_regions(
        batch,
        key=jax.random.key(7) if key is None else key,
        epoch=epoch,
        crops=crops,
        size=(8, 8),
        label_format=FORMAT,
        num_classes=CLASSES,
    )


def test_a_file_holds_what_was_written(regions, tmp_path):
    path = tmp_path / "regions.npz"
    for written in (
        regions,
        dataclasses.replace(
            regions, probability=regions.probability.astype(np.float16)
        ),
    ):
        data.write_regions(path, written)
        read = data.read_regions(path)
        for field in dataclasses.fields(data.Regions):
            a, b = getattr(written, field.name), getattr(read, field.name)
            assert type(a) is type(b)
            np.testing.assert_array_equal(a, b)
            assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
    assert [p.name for p in tmp_path.iterdir()] == ["regions.npz"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coords": np.ones((RECORDS, REGIONS, 4), np.float32)}, "reach outside"),
        ({"coords": np.full((RECORDS, REGIONS, 4), np.nan, np.float32)}, "outside"),
        ({"coords": np.zeros((RECORDS, REGIONS, 4), np.float32)}, "empty"),
        ({"coords": np.zeros((RECORDS, REGIONS, 4), int)}, "coords has dtype int64"),
        ({"flip": np.zeros((RECORDS, 1), bool)}, r"flip has shape \(5, 1\)"),
        ({"flip": np.zeros((RECORDS, REGIONS), np.uint8)}, "flip has dtype uint8"),
        ({"index": np.full((RECORDS, REGIONS, 2), 4)}, "from 4 to 4 .* 4 classes"),
        ({"index": np.full((RECORDS, REGIONS, 2), -1)}, "from -1 to -1"),
        ({"index": np.zeros((RECORDS, REGIONS, 3), int)}, "need .5, 6, 2."),
        ({"probability": np.full((RECORDS, REGIONS, 2), 1.5)}, "outside .0, 1."),
        ({"label_format": "soft"}, "label_format must be"),
        ({"num_classes": 2}, "needs at least 3 classes"),
        ({"image_shape": (8, 8)}, r"image_shape is \(8, 8\)"),
    ],
)
def test_impossible_values_are_refused_in_memory_and_in_files(
    regions, tmp_path, change, message
):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(regions, **change)
    assert "\n" not in str(error.value)
    path = tmp_path / "bad.npz"
    np.savez(path, **(dataclasses.asdict(regions) | change))
    with pytest.raises(data.DamagedFileError, match=message) as error:
        data.read_regions(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_other_files_are_refused(regions, tmp_path):
    with pytest.raises(FileNotFoundError, match="regions: there is nothing at"):
        data.read_regions(tmp_path / "none.npz")
    path = tmp_path / "bad.npz"
    path.write_bytes(b"no zip")
    with pytest.raises(data.DamagedFileError, match="not a readable .npz"):
        data.read_regions(path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(data.DamagedFileError, match="not a readable .npz"):
        data.read_regions(tmp_path / "one.npy")
    arrays = dataclasses.asdict(regions)
    np.savez(path, **{k: v for k, v in arrays.items() if k != "flip"})
    with pytest.raises(data.DamagedFileError, match="it has no array 'flip'"):
        data.read_regions(path)
    objects = {**arrays, "flip": np.array([object()])}
    np.savez(path, **objects)
    with pytest.raises(data.DamagedFileError, match="not a readable .npz"):
        data.read_regions(path)


def test_records_carry_their_regions(source, regions):
    joined = data.with_regions(source, regions)
    assert len(joined) == RECORDS and joined.groups == source.groups
    assert joined.info == source.info
    record = joined[3]
    np.testing.assert_array_equal(record["image"], source[3]["image"])
    np.testing.assert_array_equal(record["region_box"], regions.coords[3])
    np.testing.assert_array_equal(record["region_index"], regions.index[3])
    taken = joined.take(np.array([3, 0]))
    for name, value in record.items():
        np.testing.assert_array_equal(taken[name][0], value)


class OneByOne:
    """A source without `take`."""

    def __init__(self, source):
        self.info, self.groups, self._source = source.info, source.groups, source

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self._source[index]


def test_reading_in_batches_is_offered_where_the_images_offer_it(source, regions):
    """What asks for `take` would else decode a folder of images whole."""
    assert hasattr(data.with_regions(source, regions), "take")
    streamed = data.with_regions(OneByOne(source), regions)
    assert not hasattr(streamed, "take") and getattr(streamed, "take", None) is None


def test_regions_are_held_once(source, regions):
    joined = data.with_regions(source, regions)
    record = joined[2]
    for name in ("coords", "flip", "index", "probability"):
        stored = {"coords": "region_box"}.get(name, f"region_{name}")
        assert np.shares_memory(record[stored], getattr(regions, name))


def test_writing_copies_no_array(regions, tmp_path, monkeypatch):
    given = {}
    original = np.savez

    def savez(file, **arrays):
        given.update(arrays)
        original(file, **arrays)

    monkeypatch.setattr(np, "savez", savez)
    data.write_regions(tmp_path / "regions.npz", regions)
    assert given["probability"] is regions.probability


@pytest.mark.parametrize("rows", [2, 5, 100])
def test_a_streamed_file_is_the_file_that_is_written_at_once(regions, tmp_path, rows):
    asked = []

    def read(first, last):
        asked.append((first, last))
        return {name: getattr(regions, name)[first:last] for name in fields}

    fields = region_fields(REGIONS, FORMAT, CLASSES)
    names = ("label_format", "num_classes", "image_shape")
    stream_regions(
        tmp_path / "streamed.npz",
        read,
        records=RECORDS,
        fields=fields,
        constants={name: getattr(regions, name) for name in names},
        rows=rows,
    )
    assert max(last - first for first, last in asked) == min(rows, RECORDS)
    data.write_regions(tmp_path / "whole.npz", regions)
    with np.load(tmp_path / "streamed.npz") as a, np.load(tmp_path / "whole.npz") as b:
        assert set(a.files) == set(b.files)
        for name in a.files:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])
    read_back = data.read_regions(tmp_path / "streamed.npz")
    assert read_back.image_shape == regions.image_shape


def test_damaged_labels_have_a_remedy_of_their_own(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    with pytest.raises(data.DamagedFileError) as error:
        data.read_regions(tmp_path / "bad.npz")
    text = str(error.value)
    assert text.endswith("; write the labels anew, or restore the file")
    assert "on_error" not in text


def test_the_pipeline_delivers_the_regions_of_each_record(source, regions):
    for inner in (source, OneByOne(source)):
        batches = data.train_batches(
            data.with_regions(inner, regions), batch_size=4, seed=0, epochs=1
        )
        batch = batches[0]
        index = batch["index"]
        np.testing.assert_array_equal(batch["region_box"], regions.coords[index])
        np.testing.assert_array_equal(batch["region_flip"], regions.flip[index])
        np.testing.assert_array_equal(
            batch["label"], source.take(index)["label"].astype(np.int32)
        )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (slice(0, 4), "differ in records: 5 and 4"),
        (slice(None), "differ in image shape: .12, 10, 3. and .12, 12, 3."),
    ],
)
def test_regions_of_other_images_are_an_error(source, regions, rows, message):
    arrays = {
        name: getattr(regions, name)[rows]
        for name in ("coords", "flip", "index", "probability")
    }
    shape = (12, 10, 3) if rows.stop else (12, 12, 3)
    other = dataclasses.replace(regions, **arrays, image_shape=shape)
    with pytest.raises(ValueError, match=message):
        data.with_regions(source, other)


def test_regions_with_other_classes_or_for_pixels_are_an_error(source, regions):
    with pytest.raises(ValueError, match="differ in classes: 4 and 9"):
        data.with_regions(source, dataclasses.replace(regions, num_classes=9))
    dense = ArraySource(
        "dense",
        np.zeros((RECORDS, 12, 10, 3), np.uint8),
        np.zeros((RECORDS, 12, 10), int),
        class_names=[str(i) for i in range(CLASSES)],
    )
    with pytest.raises(ValueError, match="one label per image"):
        data.with_regions(dense, regions)


def test_a_chosen_crop_comes_with_the_label_the_teacher_gave_it(source, regions):
    """Whatever is drawn: the image is a stored crop, the target is its label."""
    joined = data.with_regions(source, regions)
    chosen = choose(batch_of(joined, [4, 2]))
    assert chosen.keys() == {"image", "label", "index", "target"}
    assert chosen["image"].shape == (6, 8, 8, 3)
    assert chosen["image"].dtype == jnp.uint8
    np.testing.assert_array_equal(chosen["index"], [4, 4, 4, 2, 2, 2])
    labels = source.take(np.array([4, 2]))["label"]
    np.testing.assert_array_equal(chosen["label"], labels.repeat(3))

    p, order = jax.lax.top_k(jax.nn.softmax(predict(chosen["image"])), 2)
    expected = recover_labels(order, p, label_format=FORMAT, num_classes=CLASSES)
    np.testing.assert_allclose(chosen["target"], expected, rtol=1e-4)


def rows_of(chosen):
    return {row.tobytes() for row in np.asarray(chosen["image"])}


def test_no_region_comes_twice_and_epochs_differ(source, regions):
    batch = batch_of(data.with_regions(source, regions), [1])
    every = rows_of(choose(batch, crops=REGIONS))
    assert len(every) == REGIONS
    epochs = [rows_of(choose(batch, crops=2, epoch=epoch)) for epoch in range(8)]
    assert all(len(rows) == 2 and rows <= every for rows in epochs)
    assert len({frozenset(rows) for rows in epochs}) > 3
    assert epochs[0] == rows_of(choose(batch, crops=2, epoch=0))
    keys = [choose(batch, crops=2, key=jax.random.key(k)) for k in range(8)]
    assert len({frozenset(rows_of(c)) for c in keys}) > 3


def test_a_records_choice_does_not_depend_on_its_neighbours(source, regions):
    joined = data.with_regions(source, regions)
    alone = choose(batch_of(joined, [3]))
    among = choose(batch_of(joined, [0, 3]))
    np.testing.assert_array_equal(alone["image"], among["image"][3:])
    np.testing.assert_array_equal(alone["target"], among["target"][3:])


def test_choices_that_are_not_there_are_an_error(source, regions):
    with pytest.raises(KeyError, match="make its source with_regions"):
        choose(batch_of(source, [0]))
    batch = batch_of(data.with_regions(source, regions), [0])
    for crops in (0, REGIONS + 1):
        with pytest.raises(ValueError, match=f"from 1 to 6, got {crops}"):
            choose(batch, crops=crops)
