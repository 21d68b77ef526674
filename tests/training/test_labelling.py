"""`--mode=label`: what is written, how it is checked, and training on it."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import main as main_lib
from jaxkd.data import target_writer as target_writer_lib
from jaxkd.data.durable import FolderLock
from jaxkd.data.targets import open_targets
from jaxkd.training import ConfigError, Plan, StopSignal, Workdir, make_setup
from jaxkd.training import view_labelling as view_labelling_lib
from jaxkd.training.labelling import TargetsDiffer, label
from jaxkd.training.loop import load_variables
from jaxkd.training.signals import Stopped
from jaxkd.training.view_labelling import verify

RECORDS = 52


def variables_of(setup, key=None):
    key = setup.seeds.keys() if key is None else key
    return {t.name: jax.jit(t.init)(key) for t in setup.stages[-1].teachers}


def live_logits(setup, view):
    """What the teacher says of view `view`, record by record and in another way."""
    (stage,) = setup.stages
    (teacher,) = stage.teachers
    variables = variables_of(setup)["teacher"]
    # The key of the stage's steps, as `TrainState` has it.
    state = stage.init_state(setup.seeds.keys())
    augment_key, _ = jax.random.split(state.key)
    batch = {
        "image": jnp.stack([setup.train[i]["image"] for i in range(RECORDS)]),
        "label": jnp.zeros(RECORDS, jnp.int32),
        "index": jnp.arange(RECORDS, dtype=jnp.int32),
    }
    seen = setup.augmentation.train(batch, key=augment_key, epoch=view, num_classes=4)
    return teacher.apply(variables, seen["image"], train=False, key=None)[0].logits


def test_every_view_holds_what_the_teacher_says_of_it(
    stored_setup, write_targets, tmp_path
):
    setup = stored_setup(targets={"views": 3})
    workdir, lines = write_targets(setup, tmp_path)
    targets = open_targets(workdir.path / "targets" / "student")
    for view in range(3):
        stored = targets.read(view, np.arange(RECORDS))["teacher0/logits/values"]
        np.testing.assert_allclose(
            stored, live_logits(setup, view), rtol=1e-5, atol=1e-5
        )
    # Views differ, or this would prove nothing.
    first, second = (targets.read(v, np.arange(RECORDS)) for v in (0, 1))
    name = "teacher0/logits/values"
    assert np.abs(first[name] - second[name]).max() > 0.1
    (line,) = lines
    assert line.startswith("student: wrote 156 answers (3 for each of 52 records, ")
    assert "MiB in 1 file) of teacher in " in line
    assert "48 of them differ from the live answers by at most" in line


def test_a_second_call_checks_and_says_so(stored_setup, write_targets, tmp_path):
    setup = stored_setup(targets={"format": "uint8"})
    workdir, _ = write_targets(setup, tmp_path)
    manifest = workdir.path / "targets" / "student" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    _, (line,) = write_targets(setup, tmp_path)
    assert line.startswith("student: checked 52 answers (1 for each of 52 records, ")
    assert manifest.stat().st_mtime_ns == before


FORMATS = {
    "full float32": {},
    "full float16": {"dtype": "float16"},
    "uint8": {"format": "uint8"},
    "topk": {"format": "topk", "top_k": 2},
    "topk float16": {"format": "topk", "top_k": 2, "dtype": "float16"},
    "taps": {"taps": ("stage1", "pooled"), "views": 5},
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_verifier_knows_its_teacher_and_catches_another(
    stored_setup, write_targets, tmp_path, name
):
    setup = stored_setup(targets=FORMATS[name])
    (stage,) = setup.stages
    workdir, _ = write_targets(setup, tmp_path)
    targets = open_targets(workdir.path / "targets" / "student")
    verified = verify(setup, stage, variables_of(setup), targets)
    assert verified.excess <= 1 and verified.records == 16 * min(
        3, stage.stored.plan.views
    )
    other = variables_of(setup)
    kernel = other["teacher"]["params"]["head"]["kernel"]
    # One weight of the last layer.
    other["teacher"]["params"]["head"]["kernel"] = kernel.at[0, 0].add(0.3)
    assert verify(setup, stage, other, targets).excess > 1


def test_two_teachers_are_stored_side_by_side(stored_setup, write_targets, tmp_path):
    setup = stored_setup(
        teachers=("teacher", "second"),
        student={"method": {"averaged_teachers": {}}},
        targets={},
    )
    workdir, (line,) = write_targets(setup, tmp_path)
    assert "of teacher, second in" in line
    stored = open_targets(workdir.path / "targets" / "student").read(0, np.arange(4))
    first, second = (stored[f"teacher{i}/logits/values"] for i in (0, 1))
    assert np.abs(first - second).max() > 1


def test_targets_that_are_not_the_teachers_are_told(
    stored_setup, write_targets, tmp_path, monkeypatch
):
    setup = stored_setup(targets={})
    write_targets(setup, tmp_path)
    original = view_labelling_lib.make_answers

    def otherwise(*args):
        answers = original(*args)

        def ask(batch, view):
            return jax.tree.map(lambda x: x + 1.0, answers.ask(batch, view))

        return view_labelling_lib.Answers(ask, answers.encode)

    monkeypatch.setattr(view_labelling_lib, "make_answers", otherwise)
    with pytest.raises(
        TargetsDiffer, match="logits differs by 1 from what teacher says"
    ):
        write_targets(setup, tmp_path)


# ---------------------------------------------------------------- interruption


class StopAfter(StopSignal):
    """A signal that comes when its flag was read so many times."""

    def __init__(self, times):
        self._left = times

    @property
    def received(self):
        self._left -= 1
        return "SIGTERM" if self._left < 0 else None


def test_a_stopped_run_keeps_whole_files_and_goes_on(
    stored_setup, write_targets, tmp_path, monkeypatch
):
    setup = stored_setup(targets={"views": 4})
    # Of a few records each, instead of MiB.
    monkeypatch.setattr(
        view_labelling_lib,
        "TargetsWriter",
        lambda path, manifest, shard_bytes: _small_shards(path, manifest),
    )
    with pytest.raises(Stopped, match=r"stage 'student', 63 of 208 answers are kept"):
        write_targets(setup, tmp_path / "a", stop=StopAfter(5))
    assert not (tmp_path / "a" / "targets" / "student").exists()
    write_targets(setup, tmp_path / "a")
    write_targets(setup, tmp_path / "b")
    a, b = (open_targets(tmp_path / n / "targets" / "student") for n in "ab")
    assert [s.sha256 for s in a.manifest.shards] == [
        s.sha256 for s in b.manifest.shards
    ]
    assert len(a.manifest.shards) == 30


def _small_shards(path, manifest):
    from jaxkd.data.target_writer import TargetsWriter

    return TargetsWriter(path, manifest, shard_bytes=7 * manifest.record_bytes)


# -------------------------------------------------------------------- refusals


def test_a_folder_that_another_process_writes_is_one_line(
    stored_config, stored_setup, tmp_path, capsys
):
    folder = tmp_path / "run" / "targets" / "student.part"
    folder.mkdir(parents=True)
    config = write_config(tmp_path / "config.py", stored_config(targets={}))
    lock = FolderLock(folder)
    status = main_lib.main([config, f"--workdir={tmp_path / 'run'}", "--mode=label"])
    lock.release()
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 1 and error.startswith("error: another process is writing ")
    assert list(folder.iterdir()) == [folder / ".lock"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(stored_setup, write_targets, tmp_path, monkeypatch):
    setup = stored_setup(targets={})
    keep = target_writer_lib._keep_only

    def fill(folder, names):
        keep(folder, names)
        name = "targets-00000-of-00001.array_record.part"
        (folder / name).symlink_to("/dev/full")

    monkeypatch.setattr(target_writer_lib, "_keep_only", fill)
    with pytest.raises(OSError, match="^cannot write .*array_record: .*No space left"):
        write_targets(setup, tmp_path)


def test_layers_that_another_method_reads_are_missed_by_the_check(
    stored_setup, write_targets, tmp_path
):
    targets = {"taps": ("pooled",)}
    write_targets(stored_setup(targets=targets), tmp_path)
    other = stored_setup(student={"method": {"srrl": {}}}, targets=targets)
    text = "written for another method: .*0/head/kernel.* not stored; delete the folder"
    with pytest.raises(ConfigError, match=text):
        write_targets(other, tmp_path)


def test_labelling_leaves_no_file_open(stored_setup, write_targets, tmp_path):
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    write_targets(stored_setup(targets={}), tmp_path)
    write_targets(stored_setup(targets={}), tmp_path)
    links = (os.readlink(link) for link in _links())
    assert not [link for link in links if link.startswith(str(tmp_path))]


def _links():
    return [p for p in Path("/proc/self/fd").iterdir() if p.is_symlink()]


def test_a_run_without_targets_has_nothing_to_label(stored_setup, tmp_path):
    setup = stored_setup(targets=None)
    with pytest.raises(
        ConfigError, match="no stage has targets; set .*student.targets"
    ):
        list(label(setup, Workdir(tmp_path), command="", stop=StopSignal()))


def test_one_process_labels(stored_setup, tmp_path, monkeypatch):
    setup = stored_setup(targets={})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="one process labels.* there are 2"):
        list(label(setup, Workdir(tmp_path), command="", stop=StopSignal()))


def test_answers_that_do_not_fit_their_format_are_refused(
    stored_setup, stored_config, write_targets, tmp_path
):
    networks = stored_config()["networks"]
    networks["teacher"]["factor"] = 1e6
    setup = stored_setup(targets={"dtype": "float16"}, networks=networks)
    with pytest.raises(
        ConfigError, match="targets: teacher0/logits.*not finite in float"
    ):
        write_targets(setup, tmp_path)
    write_targets(stored_setup(targets={}, networks=networks), tmp_path / "float32")


def test_targets_of_another_run_are_not_overwritten(
    stored_setup, write_targets, tmp_path
):
    write_targets(stored_setup(targets={}), tmp_path)
    with pytest.raises(ConfigError, match="targets.views: 1 -> 2.*delete the folder"):
        write_targets(stored_setup(targets={"views": 2}), tmp_path)


# ---------------------------------------------------------------- the command


def write_config(path, config):
    path.write_text(
        "from ml_collections import ConfigDict\n\n"
        f"def get_config(arg=''):\n    return ConfigDict({config!r})\n"
    )
    return f"--config={path}"


def trained(config):
    """The config with a teacher that must be trained, and a stage that nobody needs."""
    del config["networks"]["teacher"]["frozen"]
    config["networks"]["alone"] = dict(config["networks"]["student"])
    plain = {
        "method": {"ce": {}},
        "epochs": 1,
        "optimizer": {"name": "sgd", "learning_rate": 0.05},
    }
    config["stages"] = {"teacher": plain, "alone": plain, **config["stages"]}
    config["run"] = ("teacher", "alone", "student")
    config["evaluation"] = {"every_epochs": None}
    return config


VIEWS = {"views": 2}


@pytest.fixture(scope="module")
def labelled(stored_config, tmp_path_factory):
    """A folder after `--mode=label`, another one trained with a live teacher."""
    path = tmp_path_factory.mktemp("command")
    stored = write_config(path / "stored.py", trained(stored_config(targets=VIEWS)))
    live = write_config(path / "live.py", trained(stored_config()))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        workdir = f"--workdir={path / 'stored'}"
        statuses = [main_lib.main([stored, workdir])]
        begun = (path / "stored" / "checkpoints").exists()
        statuses.append(main_lib.main([stored, workdir, "--mode=label"]))
        statuses.append(main_lib.main([live, f"--workdir={path / 'live'}"]))
    return path, stored, statuses, begun, out.getvalue()


def test_training_asks_for_labels_first(labelled):
    _, _, statuses, begun, out = labelled
    assert statuses == [2, 0, 0] and not begun
    assert "run the same command with --mode=label first" in out.splitlines()[0]


def test_labelling_trains_what_the_teachers_need(labelled):
    path, _, _, _, out = labelled
    assert "student: wrote 104 answers" in out
    summary = json.loads((path / "stored" / "summary.json").read_text())
    assert [s["name"] for s in summary["stages"]] == ["teacher"]
    assert summary["status"] == "running"


def learned(path, config):
    """The student's variables of a finished run."""
    setup = make_setup(Plan.from_config(config))
    finished = [s["name"] for s in Workdir(path).summary()["stages"]]
    assert finished == ["teacher", "alone", "student"]
    return jax.tree.leaves(load_variables(setup, Workdir(path), "student", finished))


@pytest.mark.parametrize("resident", [False, True])
def test_training_on_stored_answers_is_training_on_live_ones(
    labelled, stored_config, tmp_path, capsys, resident
):
    """Two epochs of two views on eight devices, through the command."""
    path, config, *_ = labelled
    workdir = shutil.copytree(path / "stored", tmp_path / "run")
    options = [f"--config.train.resident={resident}", "--config.train.steps_per_call=2"]
    arguments = [config, f"--workdir={workdir}", *options]
    assert main_lib.main(arguments) == 0
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["status"] == "finished"
    stored = learned(workdir, trained(stored_config(targets=VIEWS)))
    live = learned(path / "live", trained(stored_config()))
    for x, y in zip(stored, live, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
    capsys.readouterr()
    assert main_lib.main([*arguments, "--mode=label"]) == 0
    assert "student: checked 104 answers" in capsys.readouterr().out


def test_another_method_reads_them_beside_the_teachers_checkpoint(
    labelled, stored_config, tmp_path, capsys
):
    """As docs/stored_targets.md says: of the first run's folder two things go along."""
    path, *_ = labelled
    new = tmp_path / "run"
    shutil.copytree(path / "stored/checkpoints/teacher", new / "checkpoints/teacher")
    shutil.copy(path / "stored" / "summary.json", new / "summary.json")
    folder = path / "stored" / "targets" / "student"
    config = trained(
        stored_config(
            targets={**VIEWS, "path": str(folder)},
            student={"method": {"ce": {}, "dkd": {}}, "epochs": 1},
        )
    )
    config["run"] = ("teacher", "student")
    del config["stages"]["alone"], config["networks"]["alone"]
    config = write_config(tmp_path / "config.py", config)
    assert main_lib.main([config, f"--workdir={new}"]) == 0
    summary = json.loads((new / "summary.json").read_text())
    assert [s["name"] for s in summary["stages"]] == ["teacher", "student"]
    assert not (new / "targets").exists()


def test_a_damaged_file_ends_the_command_in_one_line(
    stored_config, stored_setup, write_targets, tmp_path, capsys
):
    write_targets(stored_setup(targets={}), tmp_path / "run")
    config = write_config(tmp_path / "config.py", stored_config(targets={}))
    (file,) = (tmp_path / "run" / "targets" / "student").glob("*.array_record")
    file.write_bytes(file.read_bytes()[:-7])
    for mode in ("label", "train"):
        status = main_lib.main(
            [config, f"--workdir={tmp_path / 'run'}", f"--mode={mode}"]
        )
        error = capsys.readouterr().err
        assert status == 1 and error.count("\n") == 1
        assert "bytes and should have" in error and "--mode=label" in error
