"""Stored targets serve the run they were written for, and no other."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxkd
from jaxkd.data import DamagedFileError
from jaxkd.data.targets import (
    CONSTANTS,
    MANIFEST,
    describe_file,
    read_manifest,
    write_manifest,
)
from jaxkd.training import ConfigError, Workdir
from jaxkd.training.loop import load_variables
from jaxkd.training.target_files import (
    check_targets,
    load_targets,
    targets_folder,
)

TARGETS = {"views": 2, "format": "topk", "top_k": 2}


@pytest.fixture(scope="module")
def written(stored_setup, write_targets, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    write_targets(stored_setup(targets=TARGETS), path)
    return path


@pytest.fixture
def workdir(written, tmp_path):
    return Workdir(shutil.copytree(written, tmp_path / "run"))


def teacher_of(setup, key=None):
    """Loads a teacher as the loop does: a frozen one is what its `init` makes."""

    def load(name):
        if key is not None:
            return jax.jit(setup.networks[name].init)(key)
        return load_variables(setup, Workdir(Path()), name, [])

    return load


def load(setup, workdir, key=None):
    (stage,) = setup.stages
    return load_targets(setup, stage, workdir, teacher_of(setup, key))


def test_the_run_they_were_written_for_reads_them(stored_setup, workdir):
    setup = stored_setup(targets=TARGETS)
    check_targets(setup, workdir)
    found = load(setup, workdir)
    assert found.files.manifest.views == 2 and found.files.manifest.records == 52
    assert found.constants == ({"head": None, "norms": {}},)
    packed = found.files(1, np.arange(3))
    assert packed.keys() == setup.stages[0].stored.fields.keys()


def test_a_stage_with_live_teachers_has_none(stored_setup, workdir):
    assert load(stored_setup(targets=None), workdir) is None


def test_a_run_without_targets_says_how_to_write_them(stored_setup, tmp_path):
    setup = stored_setup(targets=TARGETS)
    with pytest.raises(ConfigError, match="run the same command with --mode=label"):
        check_targets(setup, Workdir(tmp_path))


def test_a_finished_stage_needs_none(stored_setup, tmp_path):
    workdir = Workdir(tmp_path)
    summary = {"stages": [{"name": "student"}], "results": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    check_targets(stored_setup(targets=TARGETS), workdir)


CHANGES = {
    "augmentation": (
        {"data": {"augment": {"pad_crop": 2, "flip": "horizontal"}}},
        r"augment.pad_crop: 1 -> 2",
    ),
    "data": ({"data": {"class_names": ("a", "b", "c", "d")}}, r"data.classes: .* -> "),
    "run seed": ({"seed": 2}, r"draws: .* -> "),
    "own seed": ({"targets": {**TARGETS, "seed": 2}}, r"targets.seed: None -> 2"),
    "views": ({"targets": {**TARGETS, "views": 1}}, r"targets.views: 2 -> 1"),
    "format": ({"targets": {"views": 2}}, r"targets.format: 'topk' -> 'full'"),
    "taps": ({"targets": {**TARGETS, "taps": ("stage1",)}}, r"targets.taps: "),
    "precision": ({"precision": "bfloat16"}, r"precision: 'float32' -> 'bfloat16'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused_in_one_line(stored_setup, workdir, name):
    changes, text = CHANGES[name]
    setup = stored_setup(**{"targets": TARGETS, **changes})
    with pytest.raises(ConfigError, match=text) as error:
        check_targets(setup, workdir)
    message = str(error.value)
    assert message.startswith("config.stages.student.targets: ") and "\n" not in message
    assert "restore that, or delete the folder and write it anew" in message
    # What the manifest and the run have at that place, and where the folder is.
    assert str(workdir.path / "targets" / "student") in message


def test_other_images_under_the_same_name_are_refused(
    stored_setup, stored_module, workdir, tmp_path
):
    with np.load(stored_module / "bars.npz") as arrays:
        changed = dict(arrays)
    changed["train_images"][3, 0, 0, 0] ^= 1
    np.savez(tmp_path / "bars.npz", **changed)
    setup = stored_setup(targets=TARGETS, data={"path": str(tmp_path / "bars.npz")})
    with pytest.raises(
        ConfigError, match=r"data.sha256: '\w{12}\.\.\.' -> '\w{12}\.\."
    ):
        check_targets(setup, workdir)


def test_another_version_of_the_code_is_refused(stored_setup, workdir, monkeypatch):
    monkeypatch.setattr(jaxkd, "__version__", "99.0")
    with pytest.raises(ConfigError, match="code_version: .* -> '99.0'"):
        check_targets(stored_setup(targets=TARGETS), workdir)


def test_another_teacher_is_refused(stored_setup, workdir):
    setup = stored_setup(targets=TARGETS)
    check_targets(setup, workdir)
    with pytest.raises(ConfigError, match="another teacher .*teacher0.sha256"):
        load(setup, workdir, key=jax.random.key(99))


def test_another_architecture_of_the_teacher_is_refused(
    stored_setup, stored_config, workdir
):
    networks = stored_config()["networks"]
    networks["teacher"]["factor"] = 19.0  # the variables stay the same
    setup = stored_setup(targets=TARGETS, networks=networks)
    with pytest.raises(ConfigError, match="network.options.factor: 20.0 -> 19.0"):
        load(setup, workdir)


def test_what_does_not_matter_may_change(stored_setup, workdir, tmp_path):
    moved = workdir.path.rename(tmp_path / "elsewhere")
    folder = str(moved / "targets" / "student")
    setup = stored_setup(
        targets={**TARGETS, "path": folder, "shard_mebibytes": 1},
        student={"method": {"dkd": {}}, "epochs": 7},
        data={"workers": 2, "batch_size": 8},
    )
    new = Workdir(tmp_path / "new")
    assert targets_folder(new, setup.stages[0]) == moved / "targets" / "student"
    check_targets(setup, new)
    assert load(setup, new).files.manifest.views == 2


def test_the_teachers_name_may_change(stored_setup, stored_config, workdir):
    networks = stored_config()["networks"]
    networks["professor"] = networks.pop("teacher")
    setup = stored_setup(targets=TARGETS, networks=networks, teachers=("professor",))
    assert load(setup, workdir) is not None


def test_runs_of_other_seeds_share_targets_of_a_teacher_that_follows_none(
    stored_setup, stored_config, write_targets, tmp_path
):
    """As docs/stored_targets.md says: `targets.seed`, and weights from a file."""
    networks = stored_config()["networks"]
    drawn = dict(networks["teacher"])
    path = str(tmp_path / "shared")

    def run(seed, teacher, draws=7):
        targets = {"views": 2, "path": path, "seed": draws}
        several = {**networks, "teacher": teacher}
        return stored_setup(seed=seed, targets=targets, networks=several)

    fixed = {"name": "network_of_stored:from_file", "frozen": True}
    write_targets(run(1, fixed), tmp_path / "first")
    other = run(2, fixed)
    assert load(other, Workdir(tmp_path / "second")).files.manifest.views == 2
    # Without `targets.seed` the views are others,
    with pytest.raises(ConfigError, match="targets.seed: 7 -> None"):
        load(run(2, fixed, draws=None), Workdir(tmp_path / "second"))
    # and a teacher that is drawn from the seed, or trained by the run, is another.
    with pytest.raises(ConfigError, match="another teacher"):
        load(run(2, drawn), Workdir(tmp_path / "second"))


def test_a_damaged_manifest_is_named(stored_setup, workdir):
    manifest = workdir.path / "targets" / "student" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    with pytest.raises(DamagedFileError, match="manifest.json"):
        check_targets(stored_setup(targets=TARGETS), workdir)


def test_a_truncated_file_is_found_before_the_first_step(stored_setup, workdir):
    (file,) = (workdir.path / "targets" / "student").glob("*.array_record")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match="array_record"):
        check_targets(stored_setup(targets=TARGETS), workdir)


def test_fields_that_contradict_the_identity_are_damage(stored_setup, workdir):
    path = workdir.path / "targets" / "student" / "manifest.json"
    manifest = json.loads(path.read_text())
    fields = manifest["fields"]
    fields["teacher0/logits/index"]["shape"] = [8]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DamagedFileError, match="not those of its identity"):
        load(stored_setup(targets=TARGETS), workdir)


def test_labels_of_regions_are_for_another_run(stored_setup, tmp_path):
    regions = {"regions": 2, "label_format": "marginal_smoothing_k2"}
    setup = stored_setup(targets=regions)
    with pytest.raises(ConfigError, match="--config.data.regions=.*regions.npz"):
        check_targets(setup, Workdir(tmp_path))


def test_layers_come_back_on_all_devices(stored_setup, write_targets, tmp_path):
    setup = stored_setup(
        student={"method": {"srrl": {}}}, targets={"taps": ("pooled",)}
    )
    workdir, _ = write_targets(setup, tmp_path)
    (constants,) = load(setup, workdir).constants
    variables = teacher_of(setup)("teacher")
    np.testing.assert_array_equal(
        constants["head"]["kernel"], variables["params"]["head"]["kernel"]
    )
    assert len(constants["head"]["kernel"].sharding.device_set) == 8


def test_layers_that_were_not_stored_are_named(stored_setup, write_targets, tmp_path):
    targets = {"taps": ("pooled",)}
    workdir, _ = write_targets(stored_setup(targets=targets), tmp_path)
    setup = stored_setup(student={"method": {"srrl": {}}}, targets=targets)
    check_targets(setup, workdir)
    with pytest.raises(ConfigError, match="student.targets: .*0/head/kernel") as error:
        load(setup, workdir)
    message = str(error.value)
    assert "\n" not in message and "write it anew with --mode=label" in message
    # More than what the method reads does no harm.
    more, _ = write_targets(setup, tmp_path / "more")
    assert load(stored_setup(targets=targets), more).constants == (
        {"head": None, "norms": {}},
    )


def test_layers_of_another_shape_are_refused(stored_setup, write_targets, tmp_path):
    setup = stored_setup(
        student={"method": {"srrl": {}}}, targets={"taps": ("pooled",)}
    )
    workdir, _ = write_targets(setup, tmp_path)
    folder = workdir.path / "targets" / "student"
    with np.load(folder / CONSTANTS) as arrays:
        changed = {name: array[:1] for name, array in arrays.items()}
    np.savez(folder / CONSTANTS, **changed)
    manifest = read_manifest(folder / MANIFEST)
    file = describe_file(folder / CONSTANTS, 0)
    write_manifest(folder, dataclasses.replace(manifest, constants=file))
    with pytest.raises(ConfigError, match=r"head/bias of shape \(1,\) .* has \(4,\)"):
        load(setup, workdir)


def test_targets_of_stages_that_did_not_begin_may_change(stored_setup, workdir):
    """Of the workdir: a teacher need not be trained again for more views."""
    plan = stored_setup(targets={**TARGETS, "views": 4}).plan
    (workdir.path / "checkpoints" / "teacher" / "3").mkdir(parents=True)
    workdir.check(plan)
    (workdir.path / "checkpoints" / "student" / "3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="targets.views: 2 -> 4"):
        workdir.check(plan)
    stage = plan.stages["student"]
    targets = dataclasses.replace(stage.targets, views=2, path="/elsewhere")
    stage = dataclasses.replace(stage, targets=targets)
    workdir.check(dataclasses.replace(plan, stages={"student": stage}))
