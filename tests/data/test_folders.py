"""Folders per class, and images beside masks."""

import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from jaxkd import data


def write(path, value, size=(4, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)
    return path


def spoil(path):
    path.write_bytes(path.read_bytes()[:40])


@pytest.fixture
def classes(tmp_path):
    """Two classes, each with train and test images; the grey value is the name."""
    for split, offset in (("train", 0), ("test", 100)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(3):
                value = offset + 10 * label + i
                write(tmp_path / split / name / f"{value}.png", value)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    return tmp_path


def test_each_folder_is_a_class(classes):
    source = data.load("image_folder", split="train", path=classes, channels=1)
    assert source.info.class_names == ("cat", "dog")
    assert source.info.image_shape == (4, 6, 1)
    assert source.info.task == "classification"
    values = [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]
    assert values == [0, 1, 2, 10, 11, 12]
    assert [int(source[i]["label"]) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert source[0]["label"].dtype == np.int32
    test = data.load("image_folder", split="test", path=classes)
    assert test.groups[0] == "test/cat/100.png"
    assert test[0]["image"].shape == (4, 6, 3)
    assert int(test[5]["image"][0, 0, 0]) == 112


@pytest.mark.parametrize("name", ["val", "validation", "testing"])
def test_other_names_for_the_test_folder(classes, name):
    (classes / "test").rename(classes / name)
    assert len(data.load("image_folder", split="test", path=classes)) == 6


def test_without_split_folders_groups_are_split(classes):
    options = dict(path=classes / "train", test_fraction=0.34, seed=1)
    train = data.load("image_folder", split="train", **options)
    test = data.load("image_folder", split="test", **options)
    assert (len(train), len(test)) == (4, 2)
    assert not set(train.groups) & set(test.groups)
    assert train.info.class_names == test.info.class_names == ("cat", "dog")


def test_a_group_pattern_keeps_patients_together(tmp_path):
    for patient in range(5):
        for i in range(3):
            write(tmp_path / ("a", "b")[i % 2] / f"p{patient}_{i}.png", i)
    options = dict(path=tmp_path, group_pattern=r"(p\d+)_", test_fraction=0.4)
    train = data.load("image_folder", split="train", **options)
    test = data.load("image_folder", split="test", **options)
    assert (len(train), len(test)) == (9, 6)
    assert len(set(train.groups)) == 3
    assert not set(train.groups) & set(test.groups)
    with pytest.raises(ValueError, match="finds no group in the file name p0_0.png"):
        data.load("image_folder", split="train", path=tmp_path, group_pattern="(q)")


def test_a_patient_in_both_split_folders_is_refused(tmp_path):
    for split, patients in (("train", "xy"), ("test", "yz")):
        for patient in patients:
            for name in ("a", "b"):
                write(tmp_path / split / name / f"{patient}-{split}.png", 1)
    with pytest.raises(ValueError, match="1 group.* in both splits, the first is 'y'"):
        data.load("image_folder", split="train", path=tmp_path, group_pattern="^(.)")


def test_images_of_several_sizes_need_image_size(classes):
    write(classes / "train" / "cat" / "1.png", 1, size=(5, 6))
    source = data.load("image_folder", split="train", path=classes)
    with pytest.raises(data.DamagedFileError, match="1.png: the image is 5x6 .*4x6"):
        source[1]
    source = data.load("image_folder", split="train", path=classes, image_size=8)
    assert source.info.image_shape == source[1]["image"].shape == (8, 8, 3)


def test_a_damaged_image_is_named_when_it_is_read(classes):
    spoil(classes / "train" / "dog" / "11.png")
    source = data.load("image_folder", split="train", path=classes)
    with pytest.raises(data.DamagedFileError, match="11.png"):
        source[4]


def test_damaged_images_are_skipped_counted_and_reported_once(classes, caplog):
    for name in ("cat/0.png", "dog/11.png"):
        spoil(classes / "train" / name)
    with caplog.at_level(logging.WARNING, logger="jaxkd.data.source"):
        source = data.load("image_folder", split="train", path=classes, on_error="skip")
    assert len(caplog.records) == 1
    assert "left out 2 damaged file(s)" in caplog.text
    assert "0.png" in caplog.text
    assert len(source) == len(source.groups) == 4
    assert [p[-6:] for p in source.info.skipped] == ["/0.png", "11.png"]
    values = [int(source[i]["image"][0, 0, 0]) for i in range(4)]
    assert values == [1, 2, 10, 12]


def test_images_of_another_size_are_skipped_before_training(classes, masks_of_sizes):
    write(classes / "train" / "cat" / "1.png", 1, size=(5, 6))
    options = dict(split="train", on_error="skip")
    source = data.load("image_folder", path=classes, **options)
    assert [p[-6:] for p in source.info.skipped] == ["/1.png"]
    assert {source[i]["image"].shape for i in range(len(source))} == {(4, 6, 3)}
    # Sizes do not matter where images are resized.
    source = data.load("image_folder", path=classes, image_size=8, **options)
    assert (len(source), source.info.skipped) == (6, ())
    source = data.load("image_mask_folder", path=masks_of_sizes, **options)
    assert [p[-6:] for p in source.info.skipped] == ["/b.png"]
    assert [source[i]["image"].shape[:2] for i in range(len(source))] == [(4, 6)]


@pytest.fixture
def masks_of_sizes(tmp_path):
    """Two pairs of images and masks, of different sizes."""
    folder = tmp_path / "pairs"
    for split in ("train", "test"):
        for name, size in (("a", (4, 6)), ("b", (5, 6))):
            for kind in ("images", "masks"):
                write(folder / split / kind / f"{name}.png", 1, size)
    return folder


def test_hidden_folders_are_not_searched(classes):
    copy = classes / "train" / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png"
    write(copy, 99)
    assert len(data.load("image_folder", split="train", path=classes)) == 6
    # A data set below a hidden folder is found.
    hidden = classes.parent / ".hidden"
    classes.rename(hidden)
    assert len(data.load("image_folder", split="train", path=hidden)) == 6


def test_nothing_readable_is_an_error(tmp_path):
    for name in ("a", "b"):
        spoil(write(tmp_path / "train" / name / "0.png", 0))
        write(tmp_path / "test" / name / "0.png", 0)
    with pytest.raises(ValueError, match="no readable image"):
        data.load("image_folder", split="train", path=tmp_path, on_error="skip")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: (p / "test").rename(p / "elsewhere"), "none for the test split"),
        (lambda p: (p / "test" / "dog").rename(p / "test" / "cow"), "the class 'cow'"),
        (lambda p: [f.unlink() for f in p.glob("test/*/*.png")], "no images in"),
    ],
)
def test_missing_parts_of_class_folders_are_named(classes, break_it, message):
    break_it(classes)
    with pytest.raises(FileNotFoundError, match=message):
        data.load("image_folder", split="test", path=classes)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing at .*nowhere"):
        data.load("image_folder", split="train", path=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="needs one folder per class"):
        data.load("image_folder", split="train", path=tmp_path)


def test_sources_that_read_files_survive_pickling(classes):
    source = data.load("image_folder", split="train", path=classes)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[3]["image"], source[3]["image"])


@pytest.fixture
def masks(tmp_path):
    """Images 0..9 whose mask is 255 in the upper half."""
    mask = np.zeros((4, 6), np.uint8)
    mask[:2] = 255
    for i in range(10):
        write(tmp_path / "images" / f"{i}.png", 20 * i)
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.gif")
    return tmp_path


def test_images_and_masks_are_paired_by_name(masks):
    source = data.load(
        "image_mask_folder", split="train", path=masks, threshold=127, image_size=8
    )
    assert source.info.task == "segmentation"
    assert source.info.class_names == ("background", "foreground")
    assert (len(source), source.info.image_shape) == (8, (8, 8, 1))
    for i in range(8):
        record = source[i]
        assert f"/{record['image'][0, 0, 0] // 20}.png" in source.groups[i]
        np.testing.assert_array_equal(record["label"][:, 0], [1] * 4 + [0] * 4)
        assert record["label"].dtype == np.int32


def test_mask_folders_may_lie_in_split_folders_and_have_a_suffix(masks, tmp_path):
    for split, numbers in (("training", range(6)), ("test", range(6, 10))):
        for kind, ending in (("images", ".png"), ("masks", ".gif")):
            folder = tmp_path / split / kind
            folder.mkdir(parents=True)
            for i in numbers:
                name = f"{i}{'_GT' if kind == 'masks' else ''}{ending}"
                (masks / kind / f"{i}{ending}").rename(folder / name)
    options = dict(path=tmp_path, threshold=127, mask_suffix="_GT")
    assert len(data.load("image_mask_folder", split="train", **options)) == 6
    assert len(data.load("image_mask_folder", split="test", **options)) == 4


def test_a_threshold_takes_bits_for_black_and_white(tmp_path):
    bits = np.zeros((4, 6), bool)
    bits[:2] = True
    (tmp_path / "masks").mkdir()
    for i in range(2):
        write(tmp_path / "images" / f"{i}.png", i)
        Image.fromarray(bits).save(tmp_path / "masks" / f"{i}.png")
    for threshold in (None, 127):
        source = data.load(
            "image_mask_folder", split="train", path=tmp_path, threshold=threshold
        )
        np.testing.assert_array_equal(source[0]["label"], bits)


def test_masks_are_paired_within_their_folders(tmp_path):
    for value, folder in enumerate("ab"):
        for i in range(2):
            write(tmp_path / "images" / folder / f"{i}.jpg", 100 * value)
            write(tmp_path / "masks" / folder / f"{i}_m.png", value)
    sources = [
        data.load("image_mask_folder", split=split, path=tmp_path, mask_suffix="_m")
        for split in ("train", "test")
    ]
    records = [source[i] for source in sources for i in range(len(source))]
    assert len(records) == 4
    for record in records:
        assert (record["image"] > 50).all() == record["label"].all()
    (tmp_path / "masks" / "b" / "1_m.png").rename(tmp_path / "masks" / "1_m.png")
    with pytest.raises(FileNotFoundError, match=r"1.jpg has no mask b/1_m\.\*"):
        data.load("image_mask_folder", split="train", path=tmp_path, mask_suffix="_m")


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_two_files_of_one_name_are_refused(masks, kind):
    write(masks / kind / "3.bmp", 0)
    with pytest.raises(ValueError, match=r"3\.bmp and .*3\..* have one name") as error:
        data.load("image_mask_folder", split="train", path=masks)
    assert "\n" not in str(error.value)


def test_a_mask_value_that_is_no_class_names_file_and_remedy(masks):
    source = data.load("image_mask_folder", split="train", path=masks)
    with pytest.raises(
        data.DamagedFileError, match=r"\.gif: .* value 255, .* are \[0, 1\].* threshold"
    ):
        source[0]


def test_mask_values_name_the_value_of_each_class(masks):
    options = dict(split="train", path=masks, class_names=("b", "x", "y"))
    source = data.load("image_mask_folder", mask_values=(0, 126, 255), **options)
    np.testing.assert_array_equal(source[0]["label"][:, 0], [2, 2, 0, 0])
    with pytest.raises(ValueError, match="2 values for 3 classes"):
        data.load("image_mask_folder", mask_values=(0, 255), **options)


def test_a_mask_of_another_size_names_the_mask(masks):
    write(masks / "masks" / "3.gif", 0, size=(6, 4))
    sources = [
        data.load("image_mask_folder", split=split, path=masks, threshold=127)
        for split in ("train", "test")
    ]
    with pytest.raises(
        data.DamagedFileError, match=r"3.gif: the mask is 6x4 .* 3.png is 4x6"
    ):
        for source in sources:
            for i in range(len(source)):
                source[i]
    kept = [
        data.load(
            "image_mask_folder",
            split=split,
            path=masks,
            threshold=127,
            on_error="skip",
        )
        for split in ("train", "test")
    ]
    assert sum(map(len, kept)) == 9
    assert sum(len(source.info.skipped) for source in kept) == 1


def test_partners_must_exist(masks):
    (masks / "masks" / "5.gif").unlink()
    with pytest.raises(FileNotFoundError, match=r"5.png has no mask 5\.\*"):
        data.load("image_mask_folder", split="train", path=masks)
    write(masks / "masks" / "5.gif", 0)
    (masks / "images" / "7.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 mask.* have no image.*7.gif"):
        data.load("image_mask_folder", split="train", path=masks)
    with pytest.raises(FileNotFoundError, match="no folder .*labels"):
        data.load("image_mask_folder", split="train", path=masks, masks="labels")


def test_impossible_arguments_are_refused(masks):
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 2"):
        data.load("image_mask_folder", split="train", path=masks, channels=2)
    with pytest.raises(ValueError, match="threshold makes 2 classes"):
        data.load(
            "image_mask_folder",
            split="train",
            path=masks,
            threshold=1,
            class_names=("a", "b", "c"),
        )
