"""What volumes are refused, reported, and kept in the cache."""

import gzip

import numpy as np
import pytest

from jaxkd import data

nibabel = pytest.importorskip("nibabel")


def save(path, array, affine=None):
    """Writes an array with its slices first as a file that has them last."""
    affine = np.eye(4) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(array.transpose(1, 2, 0), affine), path)
    return path


def write(path, numbers, ending=".nii.gz", shape=(5, 6, 7)):
    """Cases in the layout of LiTS; slices 2 and 3 show the tumor."""
    path.mkdir(exist_ok=True)
    label = np.zeros(shape, np.uint8)
    label[2:4, 2:4, 2:4] = 2
    for number in numbers:
        image = np.random.default_rng(number).integers(-500, 500, shape)
        save(path / f"volume-{number}{ending}", image.astype(np.int16))
        save(path / f"segmentation-{number}{ending}", label)
    return label


def both_sides(path, **options):
    return [
        data.load("lits", split=split, path=path, test_fraction=0.5, **options)
        for split in ("train", "test")
    ]


def test_a_volume_that_cannot_be_read_leaves_nothing_in_the_cache(tmp_path):
    write(tmp_path, range(2), shape=(5, 40, 40))
    for path in tmp_path.glob("volume-*"):
        path.write_bytes(path.read_bytes()[:-500])
    folder = tmp_path / "cache"
    source = data.load("lits", split="train", path=tmp_path, cache=folder)
    before = sorted(folder.iterdir())
    with pytest.raises(data.DamagedFileError, match=r"volume-\d.nii.gz"):
        source[0]
    assert sorted(folder.iterdir()) == before


def test_others_may_read_the_cache_as_they_may_read_other_files(tmp_path):
    write(tmp_path, range(2))
    data.load("lits", split="train", path=tmp_path, cache=tmp_path / "cache")[0]
    (tmp_path / "other").touch()
    modes = {file.stat().st_mode for file in (tmp_path / "cache").iterdir()}
    assert modes == {(tmp_path / "other").stat().st_mode}


def test_a_full_disk_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    write(tmp_path, range(2))

    def fail(file, array, **options):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        data.load("lits", split="train", path=tmp_path, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_compressed_volumes_without_a_cache_are_reported_once(tmp_path, caplog):
    write(tmp_path / "gz", range(3))
    write(tmp_path / "plain", range(3), ".nii")
    data.load("lits", split="train", path=tmp_path / "gz")
    assert caplog.text.count("pass cache=FOLDER") == 1
    caplog.clear()
    data.load("lits", split="train", path=tmp_path / "gz", cache=tmp_path / "cache")
    data.load("lits", split="train", path=tmp_path / "plain")
    assert "cache" not in caplog.text


def test_other_affines_in_one_case_are_reported_once(tmp_path, caplog):
    # The published split has case 0 in training and cases 1 to 4 in testing.
    label = write(tmp_path, range(5), ".nii")
    for i in (2, 4):
        save(tmp_path / f"segmentation-{i}.nii", label, np.diag([-1.0, 1, 1, 1]))
    save(tmp_path / "segmentation-0.nii", label, np.eye(4) * (1 + 1e-6))
    data.load("lits", split="train", path=tmp_path)
    assert "affine" not in caplog.text
    data.load("lits", split="test", path=tmp_path)
    assert caplog.text.count("affines") == 1
    assert "differ in 2 case(s), the first is volume-2;" in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("normalization", ["window", "slice", "volume"])
def test_voxels_that_are_not_finite_are_named(tmp_path, value, normalization):
    write(tmp_path, range(4))
    image = np.zeros((5, 6, 7))
    # The statistics of a volume come from all its slices, records from slices 2 and 3.
    image[0 if normalization == "volume" else 3, 0, 0] = value
    damaged = save(tmp_path / "volume-2.nii.gz", image)
    with pytest.raises(
        data.DamagedFileError, match=r"volume-2.nii.gz: slice \d holds vox"
    ):
        for source in both_sides(tmp_path, normalization=normalization):
            for i in range(len(source)):
                source[i]
    sources = both_sides(tmp_path, normalization=normalization, on_error="skip")
    assert sum((s.info.skipped for s in sources), ()) == (str(damaged),)
    assert sum(map(len, sources)) == 6


def test_labels_of_all_slices_are_checked_before_cases_are_kept(tmp_path):
    label = write(tmp_path, range(4))
    damaged = save(tmp_path / "segmentation-2.nii.gz", label + np.uint8(1))
    sources = both_sides(tmp_path, on_error="skip", slices="all")
    assert sum((s.info.skipped for s in sources), ()) == (str(damaged),)
    assert sum(map(len, sources)) == 15


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_headers_that_announce_more_than_the_file_can_hold_are_refused(
    tmp_path, ending
):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((30000, 30000, 3000))
    header["magic"], header["vox_offset"] = b"n+1", 352
    content = header.binaryblock + bytes(4 + 100)
    for i in range(2):
        for kind in ("volume", "segmentation"):
            path = tmp_path / f"{kind}-{i}{ending}"
            path.write_bytes(gzip.compress(content) if ending[-1] == "z" else content)
    with pytest.raises(
        data.DamagedFileError, match="segmentation-0.*announces 5400000000000 bytes"
    ):
        data.load("lits", split="train", path=tmp_path)


def test_constant_volumes_are_not_taken_for_hostile_ones(tmp_path):
    # Nothing compresses better; deflate reaches 1032 to 1.
    shape = (16, 128, 128)
    for i in range(2):
        save(tmp_path / f"volume-{i}.nii.gz", np.zeros(shape, np.int16))
        save(tmp_path / f"segmentation-{i}.nii.gz", np.zeros(shape, np.uint8))
    assert (tmp_path / "volume-0.nii.gz").stat().st_size < 524288 / 200
    source = data.load("lits", split="train", path=tmp_path, slices="all")
    np.testing.assert_array_equal(source[0]["label"], np.zeros((512, 512)))
