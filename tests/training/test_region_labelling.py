"""Labels of regions: written by one run, read by another."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.data import DamagedFileError
from jaxkd.data.crops import crop_one
from jaxkd.data.pipeline import read_records
from jaxkd.data.regions import read_regions, write_regions
from jaxkd.data.target_writer import TargetsWriter
from jaxkd.data.targets import MANIFEST, describe_file, read_manifest, write_manifest
from jaxkd.training import ConfigError, Workdir
from jaxkd.training import region_labelling as region_labelling_lib
from jaxkd.training.labelling import TargetsDiffer
from jaxkd.training.region_labelling import RegionLabels
from jaxkd.training.signals import Stopped, StopSignal
from jaxkd.training.target_files import REGIONS, check_targets, load_targets

TARGETS = {"regions": 3, "label_format": "marginal_smoothing_k2"}


@pytest.fixture(scope="module")
def written(stored_setup, write_targets, tmp_path_factory):
    setup = stored_setup(targets=TARGETS)
    workdir, (line,) = write_targets(setup, tmp_path_factory.mktemp("run"))
    return setup, workdir.path / "targets" / "student", line


def student_run(stored_setup, regions, **data):
    """A run that learns from the labels alone."""
    data = {"regions": str(regions), "region_crops": 2, "augment": {}, **data}
    method = {"fkd": {"labels": "stored"}}
    return stored_setup(
        student={"method": method, "teachers": (), "targets": None}, data=data
    )


def test_the_line_says_what_was_written(written):
    _, folder, line = written
    assert line.startswith("student: wrote 156 answers (3 for each of 52 records, ")
    assert str(folder) in line and "24 of them differ" in line


def test_labels_are_the_teachers_of_the_very_crops(written):
    setup, folder, _ = written
    (stage,) = setup.stages
    (teacher,) = stage.teachers
    regions = read_regions(folder / REGIONS)
    variables = jax.jit(teacher.init)(setup.seeds.keys())
    for record in (0, 17):
        image = jnp.asarray(setup.train[record]["image"])
        for i in range(3):
            box, flip = regions.coords[record, i], regions.flip[record, i]
            cut = crop_one(image, jnp.asarray(box), jnp.asarray(flip), size=(8, 8))
            logits = teacher.apply(variables, cut[None] / 255, train=False, key=None)[
                0
            ].logits
            expected = np.sort(jax.nn.softmax(logits[0]))[::-1][:2]
            np.testing.assert_allclose(
                regions.probability[record, i], expected, atol=1e-5
            )


def test_another_run_trains_on_the_labels(written, stored_setup):
    _, folder, _ = written
    setup = student_run(stored_setup, folder / REGIONS)
    (stage,) = setup.stages
    assert stage.method.num_teachers == 0 and stage.live_teachers == ()
    records = [setup.train[i] for i in range(8)]
    batch = {k: np.stack([r[k] for r in records]) for k in records[0]}
    batch |= {"index": np.arange(8, dtype=np.int32)}
    batch["label"] = batch["label"].astype(np.int32)
    step = jax.jit(stage.train_step(setup.augmentation))
    _, metrics = step(stage.init_state(setup.seeds.keys()), batch, ())
    assert 0 < float(metrics["terms"]["fkd"]) < 10


def test_the_labels_of_other_records_are_refused(
    written, stored_setup, stored_module, tmp_path
):
    _, folder, _ = written
    with np.load(stored_module / "bars.npz") as arrays:
        changed = dict(arrays)
    changed["train_labels"][0] += 1
    np.savez(tmp_path / "bars.npz", **changed)
    with pytest.raises(ConfigError, match="config.data: .*other records: sha256"):
        student_run(stored_setup, folder / REGIONS, path=str(tmp_path / "bars.npz"))


@pytest.mark.parametrize(
    "augment",
    [{"rotate": 5.0}, {"pad_crop": 1}, {"rot90": True}, {"flip": "horizontal"}],
)
def test_what_would_change_the_crops_is_refused(written, stored_setup, augment):
    _, folder, _ = written
    text = f"config.data.augment: {next(iter(augment))} would change crops"
    with pytest.raises(ConfigError, match=text):
        student_run(stored_setup, folder / REGIONS, augment=augment)


def test_the_student_sees_the_part_of_the_crops_that_the_teacher_saw(
    written, stored_setup
):
    _, folder, _ = written
    augment = {"crop_box": (0, 6, 0, 6)}
    text = r"augment: crop_box is \(0, 6, 0, 6\).*with crop_box None"
    with pytest.raises(ConfigError, match=text):
        student_run(stored_setup, folder / REGIONS, augment=augment)


def test_labels_without_a_manifest_are_read_as_before(written, stored_setup, tmp_path):
    _, folder, _ = written
    alone = shutil.copy(folder / REGIONS, tmp_path / "alone.npz")
    assert len(student_run(stored_setup, alone).train) == 52


def test_a_stage_goes_on_with_the_labels_that_it_began_with(
    written, stored_setup, tmp_path
):
    _, folder, _ = written
    copy = shutil.copytree(folder, tmp_path / "copy")
    workdir = Workdir(tmp_path / "run")

    def resume(path):
        setup = student_run(stored_setup, path)
        check_targets(setup, workdir)
        load_targets(setup, setup.stages[0], workdir, lambda name: {})

    change(copy, probability=read_regions(copy / REGIONS).probability * 0.9)
    # Until something is saved, labels may change.
    resume(copy / REGIONS)
    resume(folder / REGIONS)
    (workdir.checkpoints("student") / "3").mkdir(parents=True)
    resume(folder / REGIONS)
    moved = shutil.copy(folder / REGIONS, tmp_path / "moved.npz")
    resume(moved)
    text = "config.data.regions: .*copy.* has other labels .*'student' began with"
    setup = student_run(stored_setup, copy / REGIONS)
    with pytest.raises(ConfigError, match=text):
        check_targets(setup, workdir)
    with pytest.raises(ConfigError, match=text):
        load_targets(setup, setup.stages[0], workdir, lambda name: {})
    (workdir.path / "regions.json").write_text("[1")
    with pytest.raises(DamagedFileError, match="regions.json.*; delete it, if"):
        resume(folder / REGIONS)


def labels_of(setup, key=None):
    (stage,) = setup.stages
    (teacher,) = stage.teachers
    variables = jax.jit(teacher.init)(setup.seeds.keys() if key is None else key)
    return RegionLabels(setup, stage, {"teacher": variables})


def test_the_check_knows_its_teacher_and_catches_another(written):
    setup, folder, _ = written
    for key, differs in ((None, False), (jax.random.key(9), True)):
        verified = labels_of(setup, key).verify(folder)
        assert (verified.excess > 1) == differs and verified.records == 24


def change(folder, **arrays):
    """Changes what is stored, and the manifest with it."""
    regions = dataclasses.replace(read_regions(folder / REGIONS), **arrays)
    write_regions(folder / REGIONS, regions)
    file = describe_file(folder / REGIONS, regions.flip.size)
    manifest = read_manifest(folder / MANIFEST)
    write_manifest(folder, dataclasses.replace(manifest, shards=(file,)))


CHANGES = {
    "probability": (lambda r: {"probability": r.probability * 0.9}, "labels of reg"),
    "classes": (lambda r: {"index": (r.index + 1) % 4}, "labels of regions"),
    "order": (lambda r: {"index": r.index[..., ::-1].copy()}, "labels of regions"),
    "boxes": (lambda r: {"coords": r.coords * 0.9}, "boxes of regions"),
    "flips": (lambda r: {"flip": ~r.flip}, "boxes of regions"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_second_call_finds_labels_that_are_not_the_teachers(
    written, write_targets, tmp_path, name
):
    setup, folder, _ = written
    copy = shutil.copytree(folder, tmp_path / "targets" / "student")
    how, text = CHANGES[name]
    change(copy, **how(read_regions(copy / REGIONS)))
    with pytest.raises(TargetsDiffer, match=text):
        write_targets(setup, tmp_path)


def test_a_second_call_checks_every_byte(written, write_targets, tmp_path):
    setup, folder, _ = written
    copy = shutil.copytree(folder, tmp_path / "targets" / "student")
    _, (line,) = write_targets(setup, tmp_path)
    assert line.startswith("student: checked 156 answers")
    stored = bytearray((copy / REGIONS).read_bytes())
    stored[len(stored) // 2] ^= 1
    (copy / REGIONS).write_bytes(stored)
    with pytest.raises(DamagedFileError, match="regions.npz: its SHA-256"):
        write_targets(setup, tmp_path)
    (copy / REGIONS).unlink()
    with pytest.raises(DamagedFileError, match="regions.npz: it is missing"):
        write_targets(setup, tmp_path)


def test_another_number_of_regions_is_one_line(written, tmp_path):
    setup, folder, _ = written
    copy = shutil.copytree(folder, tmp_path / "copy")
    regions = read_regions(copy / REGIONS)
    names = ("coords", "flip", "index", "probability")
    fewer = {name: getattr(regions, name)[:, :2] for name in names}
    write_regions(copy / REGIONS, dataclasses.replace(regions, **fewer))
    with pytest.raises(DamagedFileError, match="2 regions of 52 records and should"):
        labels_of(setup).verify(copy)


def test_what_is_there_is_not_overwritten(written, write_targets, tmp_path):
    setup, folder, _ = written
    there = tmp_path / "targets" / "student"
    there.mkdir(parents=True)
    shutil.copy(folder / REGIONS, there / REGIONS)
    before = (there / REGIONS).read_bytes()
    with pytest.raises(ConfigError, match="student.targets: .* there already and not"):
        write_targets(setup, tmp_path)
    assert (there / REGIONS).read_bytes() == before


class StopAfter(StopSignal):
    """A signal that comes when its flag was read so many times."""

    def __init__(self, times):
        self._left = times

    @property
    def received(self):
        self._left -= 1
        return "SIGTERM" if self._left < 0 else None


def test_a_stopped_call_keeps_whole_files_and_goes_on(
    written, write_targets, tmp_path, monkeypatch
):
    setup, folder, _ = written
    asked = []

    def writer(path, manifest, shard_bytes):
        del shard_bytes
        return TargetsWriter(path, manifest, shard_bytes=5 * manifest.record_bytes)

    class Counted(region_labelling_lib.InOrder):
        def __getitem__(self, step):
            asked.append(step)
            return super().__getitem__(step)

    monkeypatch.setattr(region_labelling_lib, "TargetsWriter", writer)
    monkeypatch.setattr(region_labelling_lib, "InOrder", Counted)
    # Eight records to a call: after the third one 16 are written, 15 in whole files.
    with pytest.raises(Stopped, match="stage 'student', 45 of 156 answers are kept"):
        write_targets(setup, tmp_path, stop=StopAfter(2))
    assert not (tmp_path / "targets" / "student").exists()
    asked.clear()
    _, (line,) = write_targets(setup, tmp_path)
    assert line.startswith("student: wrote 156 answers") and min(asked) == 1
    there = tmp_path / "targets" / "student"
    assert sorted(f.name for f in there.iterdir()) == [MANIFEST, REGIONS]
    a, b = read_regions(folder / REGIONS), read_regions(there / REGIONS)
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        np.testing.assert_array_equal(x, y)


def test_crops_of_several_records_go_to_all_devices(written):
    setup, _, _ = written
    labels = labels_of(setup)
    assert labels._records_per_call == 8
    batch = read_records(setup.train, np.arange(8, dtype=np.int32))
    found = labels._ask()(batch, labels._draw()(batch["index"]))
    assert found.shape == (8, 3, 4) and len(found.sharding.device_set) == 8
    assert found.addressable_shards[0].data.shape == (1, 3, 4)


def test_the_manifest_tells_teacher_and_data(written):
    setup, folder, _ = written
    manifest = read_manifest(folder / MANIFEST)
    assert (manifest.records, manifest.views) == (52, 3)
    assert manifest.identity["data"] == setup.fingerprint
    assert len(manifest.identity["teachers"]["teacher0"]["sha256"]) == 64
