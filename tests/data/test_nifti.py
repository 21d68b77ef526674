"""Volumes in the layouts of KiTS19, LiTS, the Decathlon, and plain folders."""

import gzip
import json
import logging
import os
import pickle
import sys

import numpy as np
import pytest

from jaxkd import data
from jaxkd.data import cases, nifti, volumes

nibabel = pytest.importorskip("nibabel")


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def ct(seed, shape=(5, 6, 7)):
    """A volume in Hounsfield units and its labels, slices first.

    Slice 0 is empty, slices 1 to 3 show the organ, slices 2 and 3 the tumor.
    """
    image = np.random.default_rng(seed).integers(-500, 500, shape).astype(np.int16)
    label = np.zeros(shape, np.uint8)
    label[1:4, 1:5, 1:5] = 1
    label[2:4, 2:4, 2:4] = 2
    return image, label


def write_kits(path, numbers, shape=(5, 6, 7)):
    for number in numbers:
        image, label = ct(number, shape)
        folder = path / f"case_{number:05d}"
        save(folder / "imaging.nii.gz", image)
        save(folder / "segmentation.nii.gz", label)
    return path


def write_lits(path, numbers, ending=".nii", shape=(5, 6, 7)):
    for number in numbers:
        image, label = ct(number, shape)
        # On disk the slice axis is the last; the loader transposes by (2, 0, 1).
        save(path / f"volume-{number}{ending}", image.transpose(1, 2, 0))
        save(path / f"segmentation-{number}{ending}", label.transpose(1, 2, 0))
    return path


def both_sides(name, path, **options):
    return [
        data.load(name, split=split, path=path, **options)
        for split in ("train", "test")
    ]


def spoil(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


RAW = dict(image_size=None, window=None, normalization="slice", slices="all")


def test_kits19_gives_windowed_tumor_slices_of_each_case(tmp_path):
    write_kits(tmp_path, range(5))
    train, test = both_sides("kits19", tmp_path, image_size=None)
    assert (len(set(train.groups)), len(set(test.groups))) == (4, 1)
    assert not set(train.groups) & set(test.groups)
    assert (len(train), len(test)) == (8, 2)  # two tumor slices per case
    assert train.info.task == "segmentation"
    assert train.info.class_names == ("background", "tumor")
    assert train.info.image_shape == (6, 7, 1)
    for i in range(len(train)):
        case, number = train.slice_of(i)
        assert train.groups[i] == case
        image, label = ct(int(case[-5:]))
        record = train[i]
        assert record["image"].dtype == np.float32
        assert record["label"].dtype == np.int32
        expected = (np.clip(image[number], -200, 300) + 200) / 250 - 1
        np.testing.assert_allclose(record["image"][..., 0], expected, atol=1e-6)
        np.testing.assert_array_equal(record["label"], label[number] == 2)


@pytest.mark.parametrize(
    ("target", "slices", "numbers", "classes"),
    [
        ("tumor", "target", [2, 3], ("background", "tumor")),
        ("organ", "target", [1, 2, 3], ("background", "organ")),
        ("labels", "target", [1, 2, 3], ("background", "kidney", "tumor")),
        ("tumor", "all", [0, 1, 2, 3, 4], ("background", "tumor")),
    ],
)
def test_target_and_slices_choose_labels_and_records(
    tmp_path, target, slices, numbers, classes
):
    write_kits(tmp_path, range(2))
    source = data.load(
        "kits19",
        split="train",
        path=tmp_path,
        target=target,
        slices=slices,
        image_size=None,
    )
    assert [source.slice_of(i)[1] for i in range(len(source))] == numbers
    assert source.info.class_names == classes
    label = ct(0)[1]
    expected = {"tumor": label >= 2, "organ": label > 0, "labels": label}[target]
    for i, number in enumerate(numbers):
        np.testing.assert_array_equal(source[i]["label"], expected[number])


def test_kits19_cases_without_labels_are_used_by_nobody(tmp_path):
    write_kits(tmp_path, range(3))
    # The challenge's test cases, and folders of other names.
    save(tmp_path / "case_00210" / "imaging.nii.gz", ct(0)[0])
    (tmp_path / "case_list").mkdir()
    assert sum(len(s) for s in both_sides("kits19", tmp_path)) == 6
    # A training case must have them.
    (tmp_path / "case_00001" / "segmentation.nii.gz").unlink()
    with pytest.raises(data.DamagedFileError, match="case_00001.*no such file"):
        both_sides("kits19", tmp_path)
    sources = both_sides("kits19", tmp_path, on_error="skip", test_fraction=0.4)
    assert sum(len(source.info.skipped) for source in sources) == 1


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("folders", ["one", "two", "split"])
def test_lits_is_found_in_its_folders_and_transposed(tmp_path, ending, folders):
    write_lits(tmp_path, range(4), ending)
    if folders == "two":
        for i in range(4):
            for kind in ("volume", "segmentation"):
                batch = tmp_path / f"Training Batch {1 + i // 2}"
                batch.mkdir(exist_ok=True)
                file = tmp_path / f"{kind}-{i}{ending}"
                file.rename(batch / file.name)
    elif folders == "split":
        (tmp_path / "segmentations").mkdir()
        for file in list(tmp_path.glob("segmentation-*")):
            file.rename(tmp_path / "segmentations" / file.name)
    train, test = both_sides("lits", tmp_path, image_size=None, test_fraction=0.25)
    assert (len(set(train.groups)), len(set(test.groups))) == (3, 1)
    for source in (train, test):
        for i in range(len(source)):
            case, number = source.slice_of(i)
            image, label = ct(int(case.removeprefix("volume-")))
            expected = (np.clip(image[number], -40, 160) + 40) / 100 - 1
            record = source[i]
            np.testing.assert_allclose(record["image"][..., 0], expected, atol=1e-6)
            np.testing.assert_array_equal(record["label"], label[number] == 2)


def test_lits_files_that_are_there_twice_are_refused(tmp_path):
    write_lits(tmp_path / "a", range(2))
    write_lits(tmp_path / "b", range(1, 3))
    with pytest.raises(ValueError, match="volume-1 is there twice"):
        data.load("lits", split="train", path=tmp_path)


def write_decathlon(path, channels=None):
    training = []
    for i in range(4):
        image, label = ct(i)
        image = image.transpose(1, 2, 0)
        if channels:
            image = np.stack([image + j for j in range(channels)], axis=-1)
        save(path / "imagesTr" / f"liver_{i}.nii.gz", image)
        save(path / "labelsTr" / f"liver_{i}.nii.gz", label.transpose(1, 2, 0))
        names = (f"./{kind}Tr/liver_{i}.nii.gz" for kind in ("images", "labels"))
        training.append(dict(zip(("image", "label"), names, strict=True)))
    labels = {"0": "background", "1": "liver", "2": "cancer"}
    content = {"labels": labels, "training": training, "test": ["./imagesTs/x.nii.gz"]}
    (path / "dataset.json").write_text(json.dumps(content))
    return path


def test_decathlon_reads_names_and_pairs_from_its_json(tmp_path):
    train, test = both_sides(
        "decathlon", write_decathlon(tmp_path), test_fraction=0.25, slices="all"
    )
    assert (len(train), len(test)) == (15, 5)
    assert set(train.groups) | set(test.groups) == {f"liver_{i}" for i in range(4)}
    assert train.info.class_names == ("background", "liver", "cancer")
    for i in range(5):
        case, number = test.slice_of(i)
        image, label = ct(int(case[-1]))
        record = test[i]
        np.testing.assert_array_equal(record["label"], label[number])
        # Default: zero mean and unit deviation over the volume.
        expected = (image[number] - image.mean()) / image.std()
        np.testing.assert_allclose(record["image"][..., 0], expected, atol=1e-4)


def test_decathlon_volumes_of_four_axes_give_channels(tmp_path):
    source = data.load(
        "decathlon", split="train", path=write_decathlon(tmp_path, channels=3)
    )
    assert source.info.image_shape == (6, 7, 3)
    case, number = source.slice_of(0)
    image = ct(int(case[-1]))[0]
    # Channels differ by a constant, which normalisation per channel removes.
    expected = (image[number] - image.mean()) / image.std()
    for channel in range(3):
        np.testing.assert_allclose(
            source[0]["image"][..., channel], expected, atol=1e-4
        )


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"labels": {"0": "a", "2": "b"}, "training": []}', "{}"]
)
def test_other_dataset_json_files_are_refused(tmp_path, content):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(data.DamagedFileError, match="dataset.json: expected .labels."):
        data.load("decathlon", split="train", path=tmp_path)


@pytest.mark.parametrize("axis", [0, 2])
def test_plain_folders_with_either_slice_axis(tmp_path, axis):
    for i in range(3):
        image, label = ct(i)
        order = (0, 1, 2) if axis == 0 else (1, 2, 0)
        save(tmp_path / "images" / f"p{i}.nii.gz", image.transpose(order))
        save(tmp_path / "seg" / f"p{i}.nii", label.transpose(order))
    train, test = both_sides(
        "nifti",
        tmp_path,
        class_names=("air", "body", "lesion"),
        labels="seg",
        slice_axis=axis,
        slices="all",
    )
    assert (len(train), len(test)) == (10, 5)
    case, number = test.slice_of(3)
    np.testing.assert_array_equal(test[3]["label"], ct(int(case[1:]))[1][number])
    with pytest.raises(FileNotFoundError, match="no folder .*labels"):
        data.load("nifti", split="train", path=tmp_path, class_names=("a", "b"))


def test_the_window_maps_its_ends_to_plus_and_minus_one():
    values = np.array([-1000, -40, 60, 160, 1000], np.int16)
    mapped = nifti.window(values, -40, 160)
    np.testing.assert_allclose(mapped, [-1, -1, 0, 1, 1], atol=1e-6)
    assert mapped.dtype == np.float32
    with pytest.raises(ValueError, match="low < high"):
        nifti.window(values, 1, 1)


@pytest.mark.parametrize("limits", [None, (-100.0, 100.0)])
@pytest.mark.parametrize("normalization", ["slice", "volume"])
def test_normalising_by_slice_or_by_volume(tmp_path, normalization, limits):
    write_kits(tmp_path, range(2))
    source = data.load(
        "kits19",
        split="train",
        path=tmp_path,
        **{**RAW, "normalization": normalization, "window": limits},
    )
    case, number = source.slice_of(2)
    volume = ct(int(case[-5:]))[0].astype(float)
    if limits is not None:
        volume = np.clip(volume, *limits)
    part = volume[number] if normalization == "slice" else volume
    expected = (volume[number] - part.mean()) / part.std()
    np.testing.assert_allclose(source[2]["image"][..., 0], expected, atol=1e-4)


def test_a_constant_slice_normalises_to_zero(tmp_path):
    for i in range(2):
        save(tmp_path / f"volume-{i}.nii", np.full((3, 3, 2), 7, np.int16))
        save(tmp_path / f"segmentation-{i}.nii", np.ones((3, 3, 2), np.uint8))
    source = data.load("lits", split="train", path=tmp_path, **RAW)
    np.testing.assert_array_equal(source[0]["image"], np.zeros((3, 3, 1)))


def test_slices_of_any_size_are_brought_to_one(tmp_path):
    write_kits(tmp_path, [0, 1])
    write_kits(tmp_path, [2], shape=(5, 6, 9))
    options = dict(path=tmp_path, test_fraction=0.3, seed=3)
    sources = both_sides("kits19", image_size=12, **options)
    for source in sources:
        assert source.info.image_shape == (12, 12, 1)
        for i in range(len(source)):
            record = source[i]
            assert record["image"].shape == (12, 12, 1)
            assert record["label"].shape == (12, 12)
            assert set(np.unique(record["label"])) == {0, 1}
            assert -1 <= record["image"].min() < record["image"].max() <= 1
    # Rows are doubled exactly, so every label appears twice.
    case, number = sources[0].slice_of(0)
    label = sources[0][0]["label"]
    np.testing.assert_array_equal(label[::2], label[1::2])
    with pytest.raises(ValueError, match="set image_size to bring them to one size"):
        for seed in range(9):
            both_sides("kits19", **{**options, "seed": seed}, image_size=None)


def test_the_published_split_serves_the_cases_it_knows(tmp_path, monkeypatch, caplog):
    write_kits(tmp_path, range(4))
    names = [f"case_{i:05d}" for i in range(4)]
    published = (names[:1], names[1:])
    monkeypatch.setattr(nifti, "kits19_split", lambda: published)
    train, test = both_sides("kits19", tmp_path)
    assert sorted(set(train.groups)) == names[:1]
    assert sorted(set(test.groups)) == names[1:]
    train, test = both_sides("kits19", tmp_path, test_fraction=0.25)
    assert len(set(train.groups)) == 3
    # A missing case leaves the others on their sides.
    (tmp_path / names[2]).rename(tmp_path / "elsewhere")
    train, test = both_sides("kits19", tmp_path)
    assert sorted(set(train.groups)) == names[:1]
    assert sorted(set(test.groups)) == [names[1], names[3]]
    assert "published" not in caplog.text


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 9], [1, 2, 3]])
def test_a_random_split_in_place_of_the_published_is_reported(
    tmp_path, monkeypatch, caplog, numbers
):
    write_kits(tmp_path, numbers)
    names = [f"case_{i:05d}" for i in range(4)]
    monkeypatch.setattr(nifti, "kits19_split", lambda: (names[:1], names[1:]))
    source = data.load("kits19", split="train", path=tmp_path)
    assert len(set(source.groups)) == len(numbers) - 1
    reports = [r.getMessage() for r in caplog.records if r.name == "jaxkd.data.nifti"]
    assert len(reports) == 1
    assert "used a random split instead (test_fraction=0.2, seed=0)" in reports[0]
    caplog.clear()
    data.load("kits19", split="train", path=tmp_path, test_fraction=0.2)
    assert "random split" not in caplog.text


def test_published_lists_follow_from_their_seed():
    for count, test, split in (
        (210, cases.KITS19_TEST, cases.kits19_split()),
        (131, cases.LITS_TEST, cases.lits_split()),
    ):
        order = np.random.default_rng(2311).permutation(count)
        assert list(test) == sorted(order[: len(test)])
        assert not set(split[0]) & set(split[1])
        assert len(split[0]) + len(split[1]) == count
    assert list(map(len, cases.kits19_split())) == [168, 42]
    assert list(map(len, cases.lits_split())) == [61, 70]
    assert cases.kits19_split()[1][0] == f"case_{cases.KITS19_TEST[0]:05d}"
    assert cases.lits_split()[1][0] == f"volume-{cases.LITS_TEST[0]}"


def test_five_folds_test_every_case_once(tmp_path):
    write_kits(tmp_path, range(7))
    tested = []
    for fold in range(5):
        train, test = both_sides("kits19", tmp_path, fold=fold, image_size=None)
        assert not set(train.groups) & set(test.groups)
        assert len(set(train.groups) | set(test.groups)) == 7
        tested += sorted(set(test.groups))
    assert sorted(tested) == [f"case_{i:05d}" for i in range(7)]
    with pytest.raises(ValueError, match="fold or test_fraction, not both"):
        data.load("kits19", split="train", path=tmp_path, fold=0, test_fraction=0.5)


def test_opening_reads_segmentations_and_no_images(tmp_path, monkeypatch):
    write_kits(tmp_path, range(3))
    read = []
    original = volumes.VolumeSource._read

    def spy(self, path):
        read.append(path.name)
        return original(self, path)

    monkeypatch.setattr(volumes.VolumeSource, "_read", spy)
    source = data.load("kits19", split="train", path=tmp_path)
    assert read == ["segmentation.nii.gz"] * 2
    read.clear()
    data.load("kits19", split="train", path=tmp_path, slices="all")
    assert read == []
    # Both slices of a case come from one reading of its two files.
    source[0], source[1], source[0]
    assert sorted(read) == ["imaging.nii.gz", "segmentation.nii.gz"]


def test_few_volumes_stay_in_memory(tmp_path, monkeypatch):
    write_kits(tmp_path, range(5))
    source = data.load("kits19", split="train", path=tmp_path, volumes_in_memory=2)
    for i in range(len(source)):
        source[i]
        assert len(source._open) <= 4
    # Neither volumes nor locks travel to worker processes.
    assert len(pickle.dumps(source)) < 5000
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[5]["image"], source[5]["image"])


def test_the_cache_serves_later_runs_from_disk(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    write_kits(tmp_path, range(3))
    options = dict(
        split="train",
        path=tmp_path,
        cache=str(folder),
        normalization="volume",
        image_size=None,
    )
    plain = data.load("kits19", **{**options, "cache": None})
    first = data.load("kits19", **options)
    expected = [first[i] for i in range(len(first))]
    for i, record in enumerate(expected):
        for name in record:
            np.testing.assert_array_equal(record[name], plain[i][name])
    assert {file.suffix for file in folder.iterdir()} == {".npy"}

    def refuse(self, path):
        raise AssertionError(f"{path} was read again")

    with monkeypatch.context() as patch:
        patch.setattr(volumes.VolumeSource, "_read", refuse)
        again = data.load("kits19", **options)
        for i, record in enumerate(expected):
            np.testing.assert_array_equal(again[i]["image"], record["image"])

    # A replaced file is not served from the cache.
    case, number = again.slice_of(0)
    image = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
    path = tmp_path / case / "imaging.nii.gz"
    save(path, image)
    os.utime(path, ns=(1, 1))
    fresh = data.load("kits19", **options)[0]["image"][..., 0]
    expected = (image[number] - image.mean()) / image.std()
    np.testing.assert_allclose(fresh, expected, atol=1e-4)


def test_a_pipeline_reads_volumes_in_threads(tmp_path):
    write_kits(tmp_path, range(6))
    source = data.load(
        "kits19", split="train", path=tmp_path, image_size=8, volumes_in_memory=1
    )
    batches = data.train_batches(source, batch_size=4, seed=0, epochs=3)
    iterator = iter(batches)
    for batch in iterator:
        for row, index in enumerate(batch["index"]):
            np.testing.assert_array_equal(
                batch["image"][row], source[int(index)]["image"]
            )
    iterator.close()


@pytest.mark.parametrize("kind", ["imaging", "segmentation"])
def test_a_truncated_volume_is_named_and_can_be_skipped(tmp_path, kind, caplog):
    # Large enough that the header survives.
    write_kits(tmp_path, range(4), shape=(5, 40, 40))
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 3, (5, 40, 40)).astype(np.uint8)
    damaged = tmp_path / "case_00002" / f"{kind}.nii.gz"
    save(damaged, noise)
    spoil(damaged, 0.7)
    message = f"case_00002.{kind}.nii.gz: it cannot be read"
    with pytest.raises(data.DamagedFileError, match=message):
        for source in both_sides("kits19", tmp_path):
            for i in range(len(source)):
                source[i]
    with caplog.at_level(logging.WARNING):
        sources = both_sides("kits19", tmp_path, on_error="skip", test_fraction=0.5)
    assert sum(map(len, sources)) == 6
    assert sum((s.info.skipped for s in sources), ()) == (str(damaged),)
    reports = [r for r in caplog.records if r.name == "jaxkd.data.source"]
    assert len(reports) == 1
    assert "left out 1 damaged file(s)" in caplog.text


def test_uncompressed_and_foreign_files_are_named_too(tmp_path):
    write_lits(tmp_path, range(2))
    for i in range(2):
        spoil(tmp_path / f"volume-{i}.nii", 0.8)
    source = data.load("lits", split="train", path=tmp_path)
    with pytest.raises(
        data.DamagedFileError, match=r"volume-\d.nii: it cannot be read"
    ):
        source[0]
    for i in range(2):
        (tmp_path / f"volume-{i}.nii").write_text("not a volume")
    with pytest.raises(data.DamagedFileError, match="not a readable NIfTI file"):
        data.load("lits", split="train", path=tmp_path)
    with pytest.raises(ValueError, match="none of the 1 case.* 1 damaged"):
        data.load("lits", split="train", path=tmp_path, on_error="skip")


def test_a_mask_of_another_size_names_the_mask(tmp_path):
    write_kits(tmp_path, range(2))
    for i in range(2):
        wrong = np.ones((5, 7, 6), np.uint8)
        save(tmp_path / f"case_0000{i}" / "segmentation.nii.gz", wrong)
    with pytest.raises(
        data.DamagedFileError,
        match=r"segmentation.nii.gz: the segmentation has size 5x7x6 but "
        r"imaging.nii.gz has 5x6x7",
    ):
        data.load("kits19", split="train", path=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x + np.uint8(1), "holds the label 3 but there are 3 classes"),
        (lambda x: x.astype(np.int16) - 1, "holds the label -1"),
        (lambda x: x.astype(np.float32) / 2, "holds fractions"),
        (lambda x: x[0], "expected a volume of 3 axes"),
    ],
)
def test_labels_that_are_no_classes_are_named(tmp_path, change, message):
    write_kits(tmp_path, range(2))
    for i in range(2):
        label = change(ct(i)[1])
        save(tmp_path / f"case_0000{i}" / "segmentation.nii.gz", label)
    with pytest.raises(data.DamagedFileError, match=message):
        data.load("kits19", split="train", path=tmp_path)


def test_labels_may_be_stored_as_floats_and_images_scaled(tmp_path):
    # LiTS copies store labels as floats; scanners store slope and intercept.
    for i in range(2):
        image, label = ct(i)
        save(tmp_path / f"segmentation-{i}.nii", label.transpose(1, 2, 0).astype(float))
        scaled = nibabel.Nifti1Image(image.transpose(1, 2, 0), np.eye(4))
        scaled.header.set_slope_inter(2.0, -1024.0)
        nibabel.save(scaled, tmp_path / f"volume-{i}.nii")
    source = data.load("lits", split="train", path=tmp_path, **{**RAW, "slices": "all"})
    case, number = source.slice_of(2)
    image, label = ct(int(case[-1]))
    expected = (image[number] - image[number].mean()) / image[number].std()
    np.testing.assert_allclose(source[2]["image"][..., 0], expected, atol=1e-3)
    np.testing.assert_array_equal(source[2]["label"], label[number] == 2)


def test_a_target_that_does_not_occur_is_an_error(tmp_path):
    for i in range(2):
        image, label = ct(i)
        save(tmp_path / f"case_0000{i}" / "imaging.nii.gz", image)
        save(tmp_path / f"case_0000{i}" / "segmentation.nii.gz", label.clip(0, 1))
    with pytest.raises(ValueError, match="none of the 1 case.*target='tumor'"):
        data.load("kits19", split="train", path=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(window=None), "'window' needs window="),
        (dict(window=(3.0, 3.0)), "low < high"),
        (dict(image_size=0), "image_size must be >= 1"),
        (dict(volumes_in_memory=0), "volumes_in_memory must be >= 1"),
        (dict(fold=5), "fold must be in range"),
        (dict(test_fraction=1.0), "test fraction must be in"),
    ],
)
def test_impossible_options_end_in_one_line(tmp_path, options, message):
    write_kits(tmp_path, range(5))
    with pytest.raises(ValueError, match=message) as error:
        data.load("kits19", split="train", path=tmp_path, **options)
    assert "\n" not in str(error.value)


def test_tumor_needs_a_second_label(tmp_path):
    for i in range(2):
        image, label = ct(i)
        save(tmp_path / "images" / f"{i}.nii", image)
        save(tmp_path / "labels" / f"{i}.nii", label.clip(0, 1))
    options = dict(path=tmp_path, class_names=("a", "b"), slice_axis=0)
    assert len(data.load("nifti", split="train", **options)) == 3
    with pytest.raises(ValueError, match="'tumor' is label 2 but the labels are a, b"):
        data.load("nifti", split="train", target="tumor", slices="all", **options)


def test_folders_without_cases_are_named(tmp_path):
    for name in ("kits19", "lits"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no cases in"):
            data.load(name, split="train", path=tmp_path)
    with pytest.raises(FileNotFoundError, match="no file .*dataset.json"):
        data.load("decathlon", split="train", path=tmp_path)


def test_without_nibabel_the_error_names_the_extra(tmp_path, monkeypatch):
    write_kits(tmp_path, range(2))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(
        ImportError, match=r"needs nibabel: pip install 'jaxkd\[data\]'"
    ):
        data.load("kits19", split="train", path=tmp_path)


def test_gzip_is_what_the_compressed_files_are(tmp_path):
    # Guards the fixtures: a plain file named .nii.gz would prove nothing.
    write_kits(tmp_path, [0])
    with gzip.open(tmp_path / "case_00000" / "imaging.nii.gz") as file:
        assert len(file.read()) == 352 + 5 * 6 * 7 * 2
