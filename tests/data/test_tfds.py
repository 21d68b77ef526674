"""TFDS data sets, prepared and read without TensorFlow."""

import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from jaxkd import data

tensorflow_datasets = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")


class Animals(tensorflow_datasets.core.GeneratorBasedBuilder):
    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        features = tensorflow_datasets.features
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "image": features.Image(shape=(4, 6, 3)),
                    "label": features.ClassLabel(names=["cat", "dog"]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            image = Image.fromarray(np.full((4, 6, 3), 10 * i, np.uint8))
            yield str(i), {"image": image, "label": i % 2}


class Cells(Animals):
    def _info(self):
        features = tensorflow_datasets.features
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "image": features.Tensor(
                        shape=(4, 6, 1), dtype=np.float32, encoding="zlib"
                    ),
                    "segmentation_mask": features.Tensor(
                        shape=(4, 6, 1), dtype=np.uint8, encoding="zlib"
                    ),
                }
            ),
        )

    def _generate_examples(self, count):
        for i in range(count):
            mask = np.zeros((4, 6, 1), np.uint8)
            mask[:2] = 1
            yield str(i), {"image": mask - np.float32(i), "segmentation_mask": mask}


class Scans(Animals):
    """Images of 16 bits; one record in each split has no label."""

    def _info(self):
        features = tensorflow_datasets.features
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "image": features.Tensor(
                        shape=(4, 6, 1), dtype=np.uint16, encoding="zlib"
                    ),
                    "label": features.ClassLabel(names=["cat", "dog"]),
                    "patient": features.Text(),
                    "site": features.Scalar(dtype=np.int32),
                    "index": features.Scalar(dtype=np.int32),
                }
            ),
        )

    def _generate_examples(self, count):
        for i in range(count):
            yield (
                str(i),
                {
                    "image": np.full((4, 6, 1), 13107 * i % 65536, np.uint16),
                    "label": -1 if i == 2 else i % 2,
                    "patient": f"{count}-{i // 2}",
                    "site": i // 3,
                    "index": i,
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS data folder with all data sets."""
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (Animals, Cells, Scans):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_a_classification_set_is_read_by_name(prepared):
    train = data.load("tfds", split="train", dataset="animals", path=prepared)
    test = data.load("tfds", split="test", dataset="animals", path=prepared)
    assert (len(train), len(test)) == (6, 3)
    assert train.info.task == "classification"
    assert train.info.class_names == ("cat", "dog")
    assert train.info.image_shape == (4, 6, 3)
    for i in range(3):
        record = test[i]
        assert record["image"].dtype == np.uint8
        assert record["label"].dtype == np.int32
        # Which value belongs to which class is in the pixels.
        assert record["label"] == record["image"][0, 0, 0] // 10 % 2
    assert {int(train[i]["image"][0, 0, 0]) for i in range(6)} == set(range(0, 60, 10))


def test_a_segmentation_set_is_read_by_folder(prepared):
    source = data.load(
        "tfds",
        split="train",
        path=prepared / "cells" / "1.0.0",
        class_names=("background", "cell"),
        image_size=8,
    )
    assert source.info.task == "segmentation"
    assert source.info.image_shape == (8, 8, 1)
    record = source[0]
    assert record["image"].dtype == np.float32
    assert record["label"].shape == (8, 8)
    np.testing.assert_array_equal(record["label"][:, 0], [1] * 4 + [0] * 4)


def test_images_of_sixteen_bits_are_scaled(prepared):
    source = data.load(
        "tfds", split="test", test="test[:1]", dataset="scans", path=prepared
    )
    number = source._records[0]["index"]
    image = source[0]["image"]
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, np.full((4, 6, 1), number / 5), rtol=1e-6)


def test_labels_that_are_no_classes_are_named(prepared):
    def read_all(**options):
        source = data.load("tfds", split="train", path=prepared, **options)
        return [source[i] for i in range(len(source))]

    with pytest.raises(
        ValueError,
        match=r"scans: record \d has the label -1, labels must be in \[0, 1\]; TFDS",
    ) as error:
        read_all(dataset="scans")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"has the label 1, .* in \[0, 0\]$"):
        read_all(dataset="animals", class_names=("cat",))
    with pytest.raises(ValueError, match=r"cells: record 0 has the label 1"):
        read_all(dataset="cells", class_names=("background",))


def test_a_feature_may_name_the_groups(prepared):
    options = dict(split="train", dataset="scans", path=prepared)
    source = data.load("tfds", group_key="patient", **options)
    indices = [record["index"] for record in source._records]
    assert source.groups == tuple(f"6-{i // 2}" for i in indices)
    with pytest.raises(ValueError, match="scans: 1 group.* in both splits.*'0'"):
        data.load("tfds", group_key="site", **options)
    with pytest.raises(KeyError, match="no feature 'doctor'"):
        data.load("tfds", group_key="doctor", **options)


def test_splits_may_be_parts_in_tfds_notation(prepared):
    options = dict(dataset="animals", path=prepared, train="train[:4]")
    train = data.load("tfds", split="train", **options)
    test = data.load("tfds", split="test", test="train[4:]", **options)
    values = [
        {int(source[i]["image"][0, 0, 0]) for i in range(len(source))}
        for source in (train, test)
    ]
    assert len(values[0]) == 4 and len(values[1]) == 2
    assert not values[0] & values[1]


def test_tensorflow_is_not_imported(prepared):
    data.load("tfds", split="train", dataset="animals", path=prepared)[0]
    assert "tensorflow" not in sys.modules


def test_the_source_survives_pickling(prepared):
    source = data.load("tfds", split="train", dataset="animals", path=prepared)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[2]["image"], source[2]["image"])


def test_mistakes_end_in_one_line_that_says_what_to_do(prepared, tmp_path):
    def fails(error, message, **options):
        with pytest.raises(error, match=message) as caught:
            data.load("tfds", **{"split": "train", "path": prepared, **options})
        assert "\n" not in str(caught.value)

    fails(KeyError, "no_such_set not found", dataset="no_such_set")
    fails(
        FileNotFoundError,
        "is not prepared .*array_record",
        dataset="animals",
        path=tmp_path,
    )
    fails(FileNotFoundError, "no features.json", path=prepared)
    fails(ValueError, "dataset='NAME'", path=None)
    fails(KeyError, "no split 'val'; it has", dataset="animals", train="val")
    fails(KeyError, "no feature 'photo'", dataset="animals", image_key="photo")
    fails(ValueError, "set class_names", dataset="cells")


def test_a_set_without_random_access_is_refused(prepared, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise NotImplementedError("tfrecord")

    monkeypatch.setattr(
        tensorflow_datasets.core.DatasetBuilder, "as_data_source", refuse
    )
    with pytest.raises(ValueError, match="random-access format; prepare it"):
        data.load("tfds", split="train", dataset="animals", path=prepared)
