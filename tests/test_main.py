"""The command as a user runs it: real processes, real signals, real files."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxkd import main as main_lib
from jaxkd.training import Plan, Workdir, apply_overrides, load_config, make_setup
from jaxkd.training.loop import load_variables

ROOT = Path(__file__).parent.parent

TINY = """
from ml_collections import ConfigDict

def get_config(arg=""):
    sgd = dict(name="sgd", learning_rate=0.05, schedule="cosine")
    stage = dict(epochs=3, optimizer=sgd)
    return ConfigDict(dict(
        seed=3,
        run=("teacher", "student"),
        networks=dict(
            teacher=dict(name="resnet8", width_factor=0.25),
            student=dict(name="resnet8", width_factor=0.125),
        ),
        data=dict(source="digits", batch_size=32, augment=dict(pad_crop=1)),
        stages=dict(
            teacher=dict(method=dict(ce=dict()), **stage),
            student=dict(
                teachers=("teacher",),
                method=dict(ce=dict(weight=0.1), kd=dict(weight=0.9)),
                ema=0.9,
                **stage,
            ),
        ),
        evaluation=dict(every_epochs=2),
        checkpoint=dict(every_steps=8),
        log=dict(every_steps=4),
    ))
"""
# What the command does does not depend on the network; this one compiles at once.
NETWORK = """
import flax.linen as nn
from jaxkd.layers import Outputs

class Small(nn.Module):
    num_classes: int
    features: int

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Conv(self.features, (3, 3), strides=(2, 2))(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return Outputs(logits=nn.Dense(self.num_classes)(x.mean((1, 2))), taps={})

def make(*, num_classes, width_factor=1.0):
    return Small(num_classes, int(64 * width_factor))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The same with a network of a user's own module, for what is really trained."""
    folder = tmp_path_factory.mktemp("small")
    name = "jaxkd_test_small_network"
    (folder / f"{name}.py").write_text(NETWORK)
    path = folder / "small.py"
    path.write_text(TINY.replace('"resnet8"', f'"{name}:make"'))
    sys.path.append(str(folder))
    yield path
    sys.path.remove(str(folder))
    sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def start(small, tmp_path_factory):
    """Starts the command on one device, with a compilation cache for speed."""
    cache = tmp_path_factory.mktemp("cache")
    path = [str(small.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(*arguments, config=small, devices=1):
        return subprocess.Popen(
            [sys.executable, "-m", "jaxkd.main", f"--config={config}", *arguments],
            cwd=ROOT,
            env={**environment, "JAX_NUM_CPU_DEVICES": str(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return run


def _finish(process, status):
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, err
    return out, err


def _wait_for_step(process, workdir, stage, step):
    """Waits until a checkpoint of at least `step` is complete."""
    deadline = time.monotonic() + 240
    folder = workdir / "checkpoints" / stage
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        names = os.listdir(folder) if folder.exists() else []
        if any(int(n) >= step for n in names if n.isdigit()):
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint {step} of {stage} within 240 s")


def _records(workdir, *, without=()):
    text = (workdir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in r.items() if k not in without} for r in lines]


TIMES = (
    "images_per_second",
    "step_seconds",
    "data_seconds",
    "flops_per_second",
    "ceiling_share",
)


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    out, _ = _finish(start(f"--workdir={workdir}"), 0)
    assert "teacher" in out and "report" in out
    return workdir


def test_the_same_run_on_eight_simulated_devices_gives_the_same_numbers(
    start, unbroken, tmp_path
):
    arguments = ("--config.run=('teacher',)", "--config.checkpoint.every_steps=44")
    _finish(start(f"--workdir={tmp_path / 'eight'}", *arguments, devices=8), 0)
    one, eight = (
        _records(path, without=TIMES) for path in (unbroken, tmp_path / "eight")
    )
    assert "8 x cpu" in (tmp_path / "eight" / "summary.json").read_text()
    # Rounding differs and grows with the steps: compare the first twelve.
    for a, b in zip(one[:3], eight[:3], strict=True):
        assert (a["stage"], a["step"]) == (b["stage"], b["step"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_an_interrupted_run_ends_as_the_unbroken_one(
    start, small, unbroken, tmp_path, capsys
):
    broken = tmp_path / "broken"
    process = start(f"--workdir={broken}")
    _wait_for_step(process, broken, "teacher", 40)
    process.kill()
    process.communicate()
    # A batch system signals the whole group, reading processes included.
    process = start(f"--workdir={broken}", "--config.data.workers=1")
    _wait_for_step(process, broken, "student", 8)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = _finish(process, 75)
    assert "stopped by SIGTERM in stage 'student' after step" in err
    assert "run the same command again" in err
    _, err = _finish(start(f"--workdir={broken}"), 0)
    assert "student: resumed at step" in err

    setup = make_setup(Plan.from_config(load_config(str(small))))
    for name in ("teacher", "student"):
        a, b = (
            jax.device_get(
                load_variables(setup, Workdir(path), name, ["teacher", "student"])
            )
            for path in (unbroken, broken)
        )
        jax.tree.map(np.testing.assert_array_equal, a, b)
    summaries = [
        json.loads((p / "summary.json").read_text()) for p in (unbroken, broken)
    ]
    assert summaries[0]["results"] == summaries[1]["results"]
    # The SIGTERM adds at most one record; no other is missing, doubled or different.
    a, b = (_records(p, without=TIMES) for p in (unbroken, broken))
    missing = [r for r in a if r not in b]
    assert len(missing) <= 1
    steps = [(r["stage"], r["kind"], r["step"]) for r in b]
    assert len(steps) == len(set(steps)) and 0 <= len(b) - len(a) <= 1

    before = (broken / "summary.json").read_bytes()
    assert main_lib.main([f"--config={small}", f"--workdir={broken}"]) == 0
    out = capsys.readouterr().out
    assert "the run is complete" in out and "student" in out
    assert (broken / "summary.json").read_bytes() == before


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    """A finished run of the smoke variant of configs/kd.py."""
    workdir = tmp_path_factory.mktemp("runs") / "smoke"
    config = "configs/kd.py:smoke"
    out, err = _finish(start(f"--workdir={workdir}", config=config), 0)
    return workdir, config, out, err


def test_a_run_leaves_its_files_by_their_fixed_names(finished):
    workdir, _, _, _ = finished
    assert {p.name for p in workdir.iterdir()} == {
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "predictions.npz",
        "report.html",
        "summary.json",
    }
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert list(summary["results"]) == ["teacher", "student_alone", "student"]
    for stage in summary["stages"]:
        assert {"name", "steps", "seconds", "images_per_second"} <= set(stage)
        assert stage["images_per_second"] > 0
    for cost in summary["costs"].values():
        assert cost["params"] > 0 and cost["macs"] > 0
    for metrics in summary["results"].values():
        assert 0 <= metrics["accuracy"] <= 1


def test_records_hold_terms_rates_and_times(finished):
    workdir, _, _, _ = finished
    records = _records(workdir)
    [*_, last] = [r for r in records if r["kind"] == "train"]
    assert last["stage"] == "student"
    assert set(last["terms"]) == {"ce", "kd"}
    assert set(TIMES) <= set(last)
    assert 0 < last["teacher_share"] < 1
    assert last["loss"] == pytest.approx(
        0.1 * last["terms"]["ce"] + 0.9 * last["terms"]["kd"], rel=1e-5
    )
    assert [r["network"] for r in records if r["kind"] == "eval"] == [
        "teacher",
        "student_alone",
        "student",
    ]


def test_what_a_newcomer_sees_is_short_and_without_warnings(finished):
    _, _, out, err = finished
    assert "student_alone" in out and "report:" in out
    assert "Warning" not in err and "Traceback" not in err
    assert len(err.splitlines()) < 20


def test_evaluating_again_gives_the_same_numbers(finished, start):
    workdir, config, _, _ = finished
    before = json.loads((workdir / "summary.json").read_text())["results"]
    out, _ = _finish(start(f"--workdir={workdir}", "--mode=eval", config=config), 0)
    assert json.loads((workdir / "summary.json").read_text())["results"] == before
    assert "student_alone" in out


def test_the_report_is_written_again_when_asked(finished):
    workdir, config, _, _ = finished
    (workdir / "report.html").unlink()
    arguments = [f"--config={ROOT / config}", f"--workdir={workdir}", "--mode=report"]
    assert main_lib.main(arguments) == 0
    assert "<html" in (workdir / "report.html").read_text()


def test_another_config_in_the_same_folder_is_refused(finished, capsys):
    workdir, config, _, _ = finished
    arguments = [f"--config={ROOT / config}", f"--workdir={workdir}"]
    assert main_lib.main([*arguments, "--config.seed=5"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "config.seed: 0 -> 5" in err


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    capsys, small, tmp_path
):
    rate = "--config.stages.teacher.optimizer.learning_rate=1e30"
    workdir = f"--workdir={tmp_path / 'run'}"
    assert main_lib.main([f"--config={small}", workdir, rate]) == 1
    err = capsys.readouterr().err
    assert "error: stage 'teacher', step " in err and "is not finite" in err
    assert "Traceback" not in err


def test_a_damaged_file_stops_the_run_with_its_name(capsys, small, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    damaged = tmp_path / "images" / "train" / "dog" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    arguments = [
        f"--config={small}",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.source=image_folder",
        f"--config.data.path={tmp_path / 'images'}",
        "--config.data.batch_size=16",
        "--config.data.image_size=8",
        "--config.run=('teacher',)",
    ]
    assert main_lib.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: cannot use ") and str(damaged) in err
    assert err.count("\n") == 1 and "on_error='skip'" in err
    skip = [f"--workdir={tmp_path / 'skip'}", "--config.data.on_error=skip"]
    skip.append("--config.data.batch_size=8")
    assert main_lib.main([*arguments, *skip]) == 0
    summary = json.loads((tmp_path / "skip" / "summary.json").read_text())
    assert summary["data"]["skipped_files"] == [str(damaged)]
    assert summary["data"]["train_records"] == 15


def _mistake(capsys, tiny, tmp_path, *arguments):
    """Runs a mistaken command in this process; returns what it printed."""
    workdir = tmp_path / "run"
    status = main_lib.main([f"--config={tiny}", f"--workdir={workdir}", *arguments])
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert not workdir.exists()
    return captured.err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.sed=1", "config.sed: unknown key; did you mean 'seed'?"),
        ("--config.seed=one", "config.seed: must be an integer, got 'one'"),
        ("--lr=1", "unknown argument '--lr=1'"),
        ("--mode=test", "invalid choice: 'test'"),
        (
            "--config.stages.student.method.kd.temperature=0",
            "config.stages.student.method.kd: temperature must be > 0",
        ),
        (
            "--config.stages.student.method.kd.temprature=2",
            "method 'kd' has no option 'temprature'; did you mean 'temperature'?",
        ),
        (
            "--config.stages.student.method.kdd.weight=1",
            "config.stages.student.method.kdd: no method 'kdd'",
        ),
        (
            "--config.stages.student.method.kd.weight=-1",
            "config.stages.student.method.kd: weight must be finite and >= 0",
        ),
        (
            "--config.stages.student.teachers=()",
            "config.stages.student.method.kd: needs 1 teacher, but",
        ),
        (
            "--config.stages.teacher.method.hlfd.alpha=0.1",
            "config.stages.teacher.method.hlfd: needs 1 teacher",
        ),
        (
            "--config.stages.student.method.hlfd.alpha=0.1",
            "config.stages.student.method: network 'student' has no tap 'e1'",
        ),
        (
            "--config.networks.teacher.name=resnet99",
            "config.networks.teacher: no network 'resnet99'",
        ),
        (
            "--config.networks.teacher.width=2",
            "network 'resnet8' has no option 'width'; did you mean 'width_factor'?",
        ),
        (
            "--config.networks.teacher.num_classes=100",
            "num_classes is 100 but the data have 10 classes",
        ),
        (
            "--config.networks.teacher.name=unet",
            "config.networks.teacher",
        ),
        (
            "--config.data.batch_size=2000",
            "config.data.batch_size: 2000 is more than the 1438 training records",
        ),
        (
            "--config.data.batch_size=12",
            "config.data.batch_size: 12 does not split over 8 devices; use 8 or 16",
        ),
        ("--config.data.source=cifer10", "config.data: no data source 'cifer10'; did"),
        (
            "--config.data.source=cifar10",
            "config.data: data source 'cifar10' needs the option 'path'",
        ),
        ("--config.data.colour=True", "has no option 'colour'"),
        (
            "--config.mesh.fsdp=3",
            "config.mesh: data 2 x fsdp 3 x model 1 = 6 devices wanted, 8 present; ",
        ),
        ("--config.mesh.model=2", "config.mesh.model: 2, but network 'teacher' (resne"),
        ("--distributed=here", "--distributed: must be off, auto or HOST:PORT,COUNT,"),
        ("--config.data.augment.mean=(0.5,0.5)", "config.data.augment: mean and std"),
        (
            "--config.stages.teacher.optimizer.warmup_epochs=3",
            "warmup_epochs 3 must be below epochs 3",
        ),
        ("--config.evaluation.metric=dice", "config.evaluation.metric: no metric 'di"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, tiny, tmp_path, argument, message):
    assert message in _mistake(capsys, tiny, tmp_path, argument)


def test_a_missing_file_or_folder_is_named(capsys, tiny, tmp_path):
    text = _mistake(
        capsys,
        tiny,
        tmp_path,
        "--config.data.source=cifar10",
        f"--config.data.path={tmp_path / 'nowhere'}",
    )
    assert "config.data" in text and "nowhere" in text


def test_missing_arguments_are_one_line(capsys):
    assert main_lib.main(["--workdir=x"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--config" in err


def test_report_and_eval_need_a_run(capsys, tiny, tmp_path):
    for mode in ("report", "eval"):
        text = _mistake(capsys, tiny, tmp_path, f"--mode={mode}")
        assert "holds no finished stage; run with --mode=train first" in text


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lits", "kits"])
def test_the_paper_scale_variants_run_on_volumes_of_the_real_layout(
    capsys, tmp_path, variant
):
    """Tiny networks and three slices a volume; sizes, crop and recipe are the real."""
    rng = np.random.default_rng(0)
    for case in range(4):
        image = rng.normal(0, 80, (512, 512, 3)).astype(np.float32)
        mask = np.zeros((512, 512, 3), np.uint8)
        mask[200:300, 200:300] = 1
        mask[230:260, 230:260] = 2
        if variant == "kits":
            folder = tmp_path / "data" / f"case_{case:05d}"
            names = ("imaging.nii.gz", "segmentation.nii.gz")
            image, mask = image.transpose(2, 0, 1), mask.transpose(2, 0, 1)
        else:
            folder = tmp_path / "data"
            names = (f"volume-{case}.nii", f"segmentation-{case}.nii")
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in zip(names, (image, mask), strict=True):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / name)
    status = main_lib.main(
        [
            f"--config={ROOT / 'configs/hlfd.py'}:{variant}",
            f"--workdir={tmp_path / 'run'}",
            f"--config.data.path={tmp_path / 'data'}",
            f"--config.data.cache={tmp_path / 'cache'}",
            "--config.data.test_fraction=0.25",
            "--config.data.workers=0",
            "--config.networks.teacher.width_factor=0.03125",
            "--config.networks.student.width_factor=0.03125",
            "--config.stages.teacher.epochs=1",
            "--config.stages.student.epochs=1",
            "--config.run=('teacher','student')",
        ]
    )
    captured = capsys.readouterr()
    assert status == 0, captured.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["results"]) == ["teacher", "student"]
    assert summary["stages"][1]["steps"] >= 1
    assert set(summary["stages"][1]["method"]) >= {"hlfd/flfd", "hlfd/plfd"}
    predictions = Workdir(tmp_path / "run").predictions()
    assert predictions["truth"].shape[1:] == (384, 384)
    assert predictions["truth"].max() == 1


SPECS = """
bottlefit bottlefit:digits,ghnd-kd bottlefit:digits,ghnd-ft-fe bottlefit:digits,ghnd-ft
bottlefit:digits,hnd-ft bottlefit:seg bottlefit:seg-smoke bottlefit:seg-smoke,hnd-ft
bottlefit:smoke bottlefit:cifar100 cifar100 cifar100:smoke
cifar100:resnet32x4-resnet8x4-dkd cifar100:vgg13-mobilenetv2_cifar-mlld-256
cifar100:resnet50-vgg8-crd deit deit:smoke deit:cifar100,soft dml dml:smoke dml:cifar100
digits digits:smoke fkd fkd:smoke fkd:stored function_matching
function_matching:smoke function_matching:cifar100
hlfd hlfd:smoke hlfd:sample,method=hifd hlfd:lits hlfd:kits kd kd:smoke
kd:resnet32x4-resnet8x4 kd:wrn_40_2-wrn_16_2 meal meal:v2-own meal:v1 meal:smoke
meal:cifar100 mgd_ssss mgd_ssss:smoke nkd nkd:smoke nkd:cifar100 nkd:cifar100-effective
prune:pdp prune:pdp-nm prune:gmp-kd prune:lapp prune:smoke
residual_free residual_free:smoke residual_free:cifar100-20 residual_free:cifar100-110
hard_batches hard_batches:smoke hard_batches:kd hard_batches:cifar100
sparse sparse:smoke sparse:static sparse:rigl sparse:granet-kd sparse:gmp-kd
sparse_ift sparse_ift:smoke sparse_ift:doped-kd-0.9 sparse_ift:smoke-factorized-kd
teacher_assistant teacher_assistant:smoke teacher_assistant:cifar100 uskd uskd:smoke
uskd:cifar100 vq vq:lr2vq-kd vq:smoke
""".split()


def spec_path(spec):
    name, colon, variant = spec.partition(":")
    return f"{ROOT / 'configs' / name}.py{colon}{variant}"


def test_every_config_and_variant_makes_a_plan():
    for spec in SPECS:
        Plan.from_config(load_config(spec_path(spec)))
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"shared"}
    assert files == {spec.partition(":")[0] for spec in SPECS}


@pytest.mark.parametrize("spec", [s for s in SPECS if "smoke" in s])
def test_every_smoke_variant_has_networks_and_methods_that_fit(spec):
    setup = make_setup(Plan.from_config(load_config(spec_path(spec))))
    assert setup.stages


@pytest.mark.slow
def test_every_recipe_fits_networks_of_the_cifar_families():
    shared = runpy.run_path(str(ROOT / "configs" / "shared.py"))
    for method in shared["RECIPES"]:
        config = load_config(spec_path(f"digits:{method}"))
        assert make_setup(Plan.from_config(config)).stages


def test_an_unknown_variant_lists_the_known_ones(capsys, tmp_path):
    for spec in ("configs/hlfd.py:samle", "configs/kd.py:tiny"):
        status = main_lib.main([f"--config={ROOT / spec}", f"--workdir={tmp_path}"])
        assert status == 2
        assert "has no variant" in capsys.readouterr().err


def test_changed_values_reach_the_plan():
    config = apply_overrides(
        load_config(str(ROOT / "configs/hlfd.py")), [("seed", "7")]
    )
    assert Plan.from_config(config).seed == 7
