"""Labels of regions: written by one run, read by another."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.data.crops import crop_one
from jaxkd.data.regions import read_regions, write_regions
from jaxkd.data.targets import MANIFEST, read_manifest
from jaxkd.training import ConfigError
from jaxkd.training.labelling import TargetsDiffer
from jaxkd.training.region_labelling import verify_regions
from jaxkd.training.target_files import REGIONS

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


def test_the_check_knows_its_teacher_and_catches_another(written):
    setup, folder, _ = written
    (stage,) = setup.stages
    (teacher,) = stage.teachers
    for key, differs in ((setup.seeds.keys(), False), (jax.random.key(9), True)):
        variables = {"teacher": jax.jit(teacher.init)(key)}
        verified = verify_regions(setup, stage, variables, folder)
        assert (verified.excess > 1) == differs and verified.records == 24


def test_a_second_call_checks_and_finds_changes(written, write_targets, tmp_path):
    setup, folder, _ = written
    shutil.copytree(folder, tmp_path / "targets" / "student")
    _, (line,) = write_targets(setup, tmp_path)
    assert line.startswith("student: checked 156 answers")
    regions = read_regions(tmp_path / "targets" / "student" / REGIONS)
    regions.probability[:] = regions.probability * 0.9
    write_regions(tmp_path / "targets" / "student" / REGIONS, regions)
    with pytest.raises(TargetsDiffer, match="labels of regions differs"):
        write_targets(setup, tmp_path)


def test_the_manifest_tells_teacher_and_data(written):
    setup, folder, _ = written
    manifest = read_manifest(folder / MANIFEST)
    assert (manifest.records, manifest.views) == (52, 3)
    assert manifest.identity["data"] == setup.fingerprint
    assert len(manifest.identity["teachers"]["teacher0"]["sha256"]) == 64
