"""Folders of stored targets: written, resumed, read, damaged, refused."""

import dataclasses
import errno
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxkd.data import DamagedFileError, SourceInfo, train_batches
from jaxkd.data import target_readers as target_readers_lib
from jaxkd.data import target_writer as target_writer_lib
from jaxkd.data import targets as targets_lib
from jaxkd.data.fingerprint import source_fingerprint
from jaxkd.data.target_codecs import Field
from jaxkd.data.target_writer import TargetsWriter
from jaxkd.data.targets import (
    MANIFEST,
    Manifest,
    check_crop_box,
    check_data,
    describe_file,
    join_rows,
    open_targets,
    read_manifest,
    split_rows,
    write_manifest,
)

RECORDS, VIEWS = 30, 3
FIELDS = {
    "teacher0/logits/values": Field("float16", (5,)),
    "teacher0/logits/scale": Field("float32", ()),
    "teacher0/taps/stage1/codes": Field("uint8", (2, 3)),
    "teacher0/index": Field("uint32", (2,)),
}
PLAIN = Manifest(
    identity={"data": {"sha256": "0" * 64}, "views": VIEWS},
    records=RECORDS,
    views=VIEWS,
    fields=FIELDS,
)
# Three files of 36, 36 and 18 records.
SHARD_BYTES = 36 * PLAIN.record_bytes + 5


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 100, (count, *field.shape)).astype(field.dtype)
        for name, field in FIELDS.items()
    }


ALL = rows(RECORDS * VIEWS)


class Source:
    """Images of one value each; a seed changes the values."""

    groups = ()
    info = SourceInfo(
        name="even",
        task="classification",
        class_names=("a", "b"),
        image_shape=(2, 2, 1),
    )

    def __init__(self, count=RECORDS, seed=0):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        image = np.full((2, 2, 1), i + self.seed, np.uint8)
        return {"image": image, "label": np.array(i % 2, np.int32)}


def part(first, last):
    return {name: values[first:last] for name, values in ALL.items()}


def start(path, manifest=PLAIN, shard_bytes=SHARD_BYTES):
    return TargetsWriter(path, manifest, shard_bytes=shard_bytes)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "targets"
    writer = start(path)
    for first in range(0, RECORDS * VIEWS, 7):
        writer.write(part(first, first + 7))
    writer.finish({"teacher0/head/kernel": np.arange(6.0).reshape(2, 3)})
    return path


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "targets")


@pytest.fixture(params=["in memory", "by record"])
def kind(request, monkeypatch):
    if request.param == "by record":
        monkeypatch.setattr(targets_lib, "_IN_MEMORY_BYTES", 0)


def assert_rows(found, positions):
    assert found.keys() == FIELDS.keys()
    for name, values in found.items():
        assert values.dtype == FIELDS[name].dtype
        np.testing.assert_array_equal(values, ALL[name][positions])


def test_records_are_bytes_and_nothing_else():
    joined = join_rows(ALL, FIELDS)
    assert (
        joined.shape == (RECORDS * VIEWS, 10 + 4 + 6 + 8) and joined.dtype == np.uint8
    )
    first = joined[0].tobytes()
    assert first[:10] == ALL["teacher0/logits/values"][0].astype("<f2").tobytes()
    assert first[-8:] == ALL["teacher0/index"][0].astype("<u4").tobytes()
    assert_rows(split_rows(joined, FIELDS), slice(None))


def test_every_view_of_every_record_comes_back(folder, kind):
    targets = open_targets(folder)
    for view in range(VIEWS):
        indices = np.random.default_rng(view).permutation(RECORDS)
        assert_rows(targets.read(view, indices), view * RECORDS + indices)
    # Repeated records, across the files' borders.
    assert_rows(targets.read(1, np.array([5, 6, 5])), [35, 36, 35])


def test_epochs_go_round_the_views(folder, kind):
    targets, indices = open_targets(folder), np.arange(4)
    for epoch in range(7):
        assert_rows(targets(epoch, indices), epoch % VIEWS * RECORDS + indices)


def test_copies_in_other_processes_and_threads_read_alike(folder, kind):
    targets = pickle.loads(pickle.dumps(open_targets(folder)))
    with ThreadPoolExecutor(4) as threads:
        for i, found in enumerate(
            threads.map(lambda i: targets.read(1, np.array([i, 2])), range(20))
        ):
            assert_rows(found, [RECORDS + i, RECORDS + 2])
    targets.close()
    assert_rows(targets.read(0, np.array([3])), [3])


def test_the_manifest_says_what_is_there(folder):
    manifest = read_manifest(folder / MANIFEST)
    assert [s.records for s in manifest.shards] == [36, 36, 18]
    assert manifest.record_bytes == 28
    sizes = [f.stat().st_size for f in folder.iterdir() if f.name != MANIFEST]
    assert manifest.nbytes == sum(sizes)
    assert dataclasses.replace(manifest, shards=(), constants=None) == PLAIN
    assert json.loads((folder / MANIFEST).read_text())["format_version"] == 1
    assert sorted(f.name for f in folder.iterdir()) == [
        "constants.npz",
        MANIFEST,
        *(f"targets-0000{i}-of-00003.array_record" for i in range(3)),
    ]


def test_small_records_cost_little_more_than_their_bytes(tmp_path):
    fields = {"x": Field("uint8", (32,))}
    manifest = Manifest(identity={}, records=20000, views=1, fields=fields)
    writer = TargetsWriter(tmp_path / "t", manifest, shard_bytes=2**30)
    writer.write({"x": np.zeros((20000, 32), np.uint8)})
    # The file ends with a block of 64 KiB.
    assert writer.finish({}).manifest.nbytes < 1.1 * 20000 * 32 + 2 * 2**16


def test_constants_come_back_and_are_checked(folder):
    targets = open_targets(folder)
    assert targets.constants()["teacher0/head/kernel"].tolist() == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    flip_byte(folder / "constants.npz", 60)
    with pytest.raises(DamagedFileError, match="constants.npz: its SHA-256"):
        targets.constants()


def test_nothing_to_keep_apart_makes_no_file(tmp_path):
    writer = start(tmp_path / "t")
    writer.write(ALL)
    targets = writer.finish({})
    assert targets.constants() == {} and not (tmp_path / "t" / "constants.npz").exists()


def test_batches_carry_targets_of_their_epoch(folder):
    batches = train_batches(
        Source(), batch_size=10, seed=0, epochs=5, extra=open_targets(folder)
    )
    for step in range(len(batches)):
        batch, numbers = batches[step], batches.numbers(step)
        positions = step // 3 % VIEWS * RECORDS + batch["index"]
        assert_rows({name: batch[name] for name in FIELDS}, positions)
        # A feed that has the records on the devices asks for these alone.
        assert numbers.keys() == {"index", *FIELDS}
        assert_rows({name: numbers[name] for name in FIELDS}, positions)
        assert batch["image"][:, 0, 0, 0].tolist() == numbers["index"].tolist()


# ---------------------------------------------------------------- interruption


def test_a_killed_writer_goes_on_after_its_last_whole_file(tmp_path):
    path = tmp_path / "targets"
    first = start(path)
    first.write(part(0, 50))  # one file of 36, and 14 records of the next
    del first
    assert not path.exists()
    second = start(path)
    assert second.position == 36
    second.write(part(36, 90))
    targets = second.finish({})
    assert not path.with_name("targets.part").exists()
    for view in range(VIEWS):
        indices = np.arange(RECORDS)
        assert_rows(targets.read(view, indices), view * RECORDS + indices)


def test_a_writer_that_was_only_not_renamed_needs_no_record(tmp_path, monkeypatch):
    path = tmp_path / "targets"
    writer = start(path)
    writer.write(ALL)

    def killed(unfinished, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target_writer_lib, "put_in_place", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.finish({})
    writer.close()
    again = start(path)
    # The last file was not renamed either.
    assert again.position == 72
    again.write(part(72, 90))
    assert again.finish({}).manifest.records == RECORDS


@pytest.mark.parametrize("change", ["identity", "shard size", "damage"])
def test_a_writer_of_other_targets_begins_anew(tmp_path, change):
    path = tmp_path / "targets"
    first = start(path)
    first.write(part(0, 50))
    first.close()
    manifest, size = PLAIN, SHARD_BYTES
    if change == "identity":
        manifest = dataclasses.replace(PLAIN, identity={"views": 4})
    elif change == "shard size":
        size = 40 * PLAIN.record_bytes  # as many files
    else:
        (file,) = path.with_name("targets.part").glob("*-00000-*")
        file.write_bytes(file.read_bytes()[:-1000])
    assert start(path, manifest, size).position == 0


def test_files_of_another_size_do_not_stay(tmp_path):
    """As many MiB more or less would leave files of other names behind."""
    path = tmp_path / "targets"
    first = start(path)
    first.write(part(0, 50))
    first.close()
    again = start(path, shard_bytes=10 * PLAIN.record_bytes)
    assert again.position == 0
    again.write(ALL)
    targets = again.finish({})
    named = {shard.name for shard in targets.manifest.shards}
    assert {f.name for f in path.iterdir()} == {MANIFEST, *named} and len(named) == 9


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    path = tmp_path / "targets"
    first = start(path)
    first.write(part(0, 40))
    with pytest.raises(BlockingIOError, match="another process is writing .*targets"):
        start(path)
    first.write(part(40, 90))
    first.finish({})
    with pytest.raises(FileExistsError, match="there already"):
        start(path)
    assert_rows(open_targets(path).read(0, np.arange(30)), np.arange(30))
    assert not (path / ".lock").exists()


def test_a_writer_that_ended_lets_others_write(tmp_path):
    path = tmp_path / "targets"
    for _ in range(2):
        start(path).close()
    with pytest.raises(ValueError, match="0 of 90 records"):
        start(path).finish({})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("count", [36, 5])
def test_a_full_disk_is_one_line_and_keeps_what_is_finished(tmp_path, count):
    path = tmp_path / "targets"
    writer = start(path)
    writer.write(part(0, 36))
    name = "targets-00001-of-00003.array_record"
    (tmp_path / "targets.part" / f"{name}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"^cannot write .*{name}: .*No space") as error:
        writer.write(part(36, 36 + count))  # a whole file, or the begin of one
        writer.close()
    assert "\n" not in str(error.value)
    writer.close()
    again = start(path)
    assert again.position == 36
    again.write(part(36, 90))
    assert_rows(again.finish({}).read(2, np.arange(30)), 60 + np.arange(30))


def test_records_may_end_as_one_file_of_another_format(tmp_path):
    path = tmp_path / "targets"
    writer = start(path)
    writer.write(part(0, 80))

    def write(file, targets):
        found = targets.read(2, np.arange(RECORDS))
        np.save(file, found["teacher0/index"])
        file.with_name(f"{file.name}.npy").rename(file)

    manifest = dataclasses.replace(PLAIN, fields={})
    with pytest.raises(ValueError, match="80 of 90"):
        writer.export("all.npy", manifest, write)
    writer.close()
    again = start(path)
    again.write(part(again.position, 90))
    again.export("all.npy", manifest, write)
    assert {f.name for f in path.iterdir()} == {MANIFEST, "all.npy"}
    np.testing.assert_array_equal(np.load(path / "all.npy"), ALL["teacher0/index"][60:])
    (shard,) = read_manifest(path / MANIFEST).shards
    assert shard == describe_file(path / "all.npy", 90)


def test_a_writer_leaves_what_is_there_alone(folder):
    with pytest.raises(FileExistsError, match="there already"):
        start(folder)


def test_too_few_and_too_many_records_are_refused(tmp_path):
    writer = start(tmp_path / "t")
    writer.write(part(0, 80))
    with pytest.raises(ValueError, match="80 of 90 records"):
        writer.finish({})
    with pytest.raises(ValueError, match="more than 90"):
        writer.write(part(0, 11))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, bad):
    wrong = {**part(0, 2), "teacher0/logits/values": np.full((2, 5), bad, np.float16)}
    text = "teacher0/logits/values .* not finite .*; dtype float32 holds .* float16"
    with pytest.raises(ValueError, match=text):
        start(tmp_path / "t").write(wrong)


def test_the_option_that_holds_larger_numbers_is_named():
    def refused(name, dtype):
        fields = {name: Field(dtype, (2,))}
        with pytest.raises(ValueError, match=name) as error:
            join_rows({name: np.full((1, 2), np.inf, dtype)}, fields)
        return str(error.value)

    assert "; taps_dtype float32 holds" in refused("teacher0/taps/s/values", "float16")
    assert "; dtype float32 holds" in refused("teacher0/logits/values", "float16")
    assert refused("teacher0/logits/scale", "float32").endswith("teacher trained?")


# --------------------------------------------------------------------- damage


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def shard(folder, number=1):
    return folder / f"targets-0000{number}-of-00003.array_record"


def test_a_truncated_file_is_named_before_anything_is_read(folder):
    shard(folder).write_bytes(shard(folder).read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match="00001-of-00003.*bytes and should have"):
        open_targets(folder)


def test_a_missing_file_is_named(folder):
    shard(folder, 2).unlink()
    with pytest.raises(DamagedFileError, match="00002-of-00003.*missing.*--mode=label"):
        open_targets(folder)


def test_a_damaged_record_is_found_when_it_is_read(folder, kind):
    flip_byte(shard(folder), 300)
    targets = open_targets(folder)
    with pytest.raises(DamagedFileError, match="00001-of-00003.*--mode=label"):
        targets.read(1, np.arange(6, 30))


def test_any_change_of_a_file_is_found_by_the_full_check(folder):
    targets = open_targets(folder)
    targets.check_files()
    size = shard(folder).stat().st_size
    flip_byte(shard(folder), size - 200)  # padding that no record needs
    with pytest.raises(DamagedFileError, match="00001-of-00003.*SHA-256"):
        targets.check_files()


def test_the_full_check_reads_the_constants_too(folder):
    flip_byte(folder / "constants.npz", 60)
    with pytest.raises(DamagedFileError, match="constants.npz: its SHA-256"):
        open_targets(folder).check_files()


def test_a_file_that_cannot_be_opened_is_no_damage(folder, kind, monkeypatch):
    targets = open_targets(folder)
    error = OSError(errno.EMFILE, "Too many open files", "shard")

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(target_readers_lib, "open", fail, raising=False)
        with pytest.raises(OSError, match="Too many open files") as found:
            targets.read(0, np.arange(3))
    assert found.value is error
    assert_rows(targets.read(0, np.arange(3)), np.arange(3))


def test_a_file_that_cannot_be_read_but_is_whole_is_no_damage(folder, monkeypatch):
    """A device that fails says so; nothing is to be deleted."""
    targets = open_targets(folder)

    def fail(*args):
        raise RuntimeError("read() failed: Input/output error; at byte 9")

    monkeypatch.setattr(target_readers_lib.Readers, "read", fail)
    with pytest.raises(OSError, match="record: read.. failed: Input/output error$"):
        targets.read(0, np.arange(3))


def test_a_manifest_that_cannot_be_read_is_no_damage(folder):
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()
    with pytest.raises(IsADirectoryError):
        open_targets(folder)


def test_targets_that_were_never_finished_are_refused(tmp_path):
    writer = start(tmp_path / "targets")
    writer.write(part(0, 50))
    writer.close()
    text = "manifest.json: it names no files: .*never finished; delete the folder"
    with pytest.raises(DamagedFileError, match=text):
        open_targets(tmp_path / "targets.part")


def test_copies_read_by_record(folder):
    """Every reader process would else hold all targets."""
    targets = open_targets(folder)
    copy = pickle.loads(pickle.dumps(targets))
    for each in (targets, copy):
        assert_rows(each.read(0, np.arange(3)), np.arange(3))
    assert targets._rows is not None and copy._rows is None
    copy = pickle.loads(pickle.dumps(copy))
    copy.read(0, np.arange(3))
    assert copy._rows is None


def test_damage_tells_one_remedy(folder):
    shard(folder, 2).unlink()
    with pytest.raises(DamagedFileError) as error:
        open_targets(folder)
    assert str(error.value).endswith(
        "it is missing; delete the folder and write the targets anew with --mode=label"
    )


def test_records_of_another_length_are_damage(folder):
    manifest = read_manifest(folder / MANIFEST)
    fields = {**FIELDS, "teacher0/index": Field("uint32", (3,))}
    write_manifest(folder, dataclasses.replace(manifest, fields=fields))
    with pytest.raises(DamagedFileError, match="array_record"):
        open_targets(folder).read(0, np.arange(3))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format_version": 2}', '{"format_version": 1}']
)
def test_a_damaged_manifest_is_one_line(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DamagedFileError, match=MANIFEST) as error:
        open_targets(folder)
    assert "\n" not in str(error.value)


def test_a_manifest_whose_files_lack_records_is_damaged(folder):
    manifest = read_manifest(folder / MANIFEST)
    write_manifest(folder, dataclasses.replace(manifest, views=4))
    with pytest.raises(DamagedFileError, match="90 records, but 4 views of 30"):
        open_targets(folder)


def test_no_folder_is_no_damage(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_targets(tmp_path / "nothing")


@pytest.mark.parametrize(("view", "index"), [(3, 0), (-1, 0), (0, 30), (0, -1)])
def test_what_is_not_stored_is_not_read(folder, view, index):
    with pytest.raises(IndexError, match="range"):
        open_targets(folder).read(view, np.array([index]))


# --------------------------------------------------- labels beside a manifest


def test_labels_are_checked_against_the_manifest_beside_them(tmp_path):
    labels = tmp_path / "regions.npz"
    labels.write_bytes(b"labels")
    check_data(labels, Source(6))  # nothing is known of them
    manifest = Manifest(
        identity={"data": source_fingerprint(Source(6))},
        records=6,
        views=4,
        fields={},
        shards=(describe_file(labels, 24),),
    )
    write_manifest(tmp_path, manifest)
    check_data(labels, Source(6))
    with pytest.raises(ValueError, match="regions.npz are those of other records: sha"):
        check_data(labels, Source(6, seed=1))
    # The manifest says nothing of other files.
    check_data(tmp_path / "other.npz", Source(6, seed=1))


def test_labels_are_for_the_crop_box_that_the_teacher_saw(tmp_path):
    labels = tmp_path / "regions.npz"
    labels.write_bytes(b"labels")
    check_crop_box(labels, (0, 4, 0, 4))  # nothing is known of them
    for stored in (None, [1, 7, 1, 7]):
        manifest = Manifest(
            identity={"augment": {"crop_box": stored}},
            records=6,
            views=4,
            fields={},
            shards=(describe_file(labels, 24),),
        )
        write_manifest(tmp_path, manifest)
        check_crop_box(labels, stored and tuple(stored))
        with pytest.raises(
            ValueError, match=r"crop_box is \(0, 4, 0, 4\), and the lab"
        ):
            check_crop_box(labels, (0, 4, 0, 4))
        check_crop_box(tmp_path / "other.npz", (0, 4, 0, 4))
