"""What the command says when memory or disk are used up: one line, and its status."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxkd import main as main_lib
from jaxkd.training import loop

ROOT = Path(__file__).parent.parent

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    sgd = dict(name="sgd", learning_rate=0.05)
    stage = dict(method=dict(ce=dict()), epochs=1, optimizer=sgd)
    network = dict(name="jaxkd_test_hungry_network:make")
    return ConfigDict(dict(
        run=("first", "second"),
        networks=dict(first=network, second={**network, "hungry": True}),
        data=dict(source="digits", batch_size=240),
        stages=dict(first=dict(**stage), second=dict(**stage)),
    ))
"""
NETWORK = """
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxkd.layers import Outputs

class Network(nn.Module):
    num_classes: int
    hungry: bool

    @nn.compact
    def __call__(self, images, *, train=False):
        x = images.reshape(len(images), -1)
        logits = nn.Dense(self.num_classes)(x)
        if self.hungry and train:
            # 64 TiB that no compiler can do without: nobody has so much.
            row = jnp.sin(x.sum() * jnp.arange(2**22, dtype=jnp.float32))
            many = jnp.sort(row[:, None] * row[None], axis=1)
            logits += jax.lax.stop_gradient(many[5, 7])
        return Outputs(logits=logits, taps={})

def make(*, num_classes, hungry=False):
    return Network(num_classes, hungry)
"""


@pytest.fixture(scope="module")
def hungry(tmp_path_factory):
    """A config whose second stage wants more memory than there is."""
    folder = tmp_path_factory.mktemp("hungry")
    (folder / "jaxkd_test_hungry_network.py").write_text(NETWORK)
    path = folder / "hungry.py"
    path.write_text(CONFIG)
    sys.path.append(str(folder))
    yield path
    sys.path.remove(str(folder))
    sys.modules.pop("jaxkd_test_hungry_network", None)


@pytest.fixture(scope="module")
def run_out(hungry, tmp_path_factory):
    """A run that ended so, in a process of its own: its folder and its words."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    places = [str(ROOT), str(hungry.parent)]
    done = subprocess.run(
        [sys.executable, "-m", "jaxkd.main", f"--config={hungry}"]
        + [f"--workdir={workdir}"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(places),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    return workdir, done


def test_a_stage_that_needs_more_memory_than_there_is_ends_in_one_line(run_out):
    _, done = run_out
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert line.startswith("error: out of memory in stage 'second' (RESOURCE_EXHAUSTED")
    for remedy in (
        'config.train.remat="blocks"',
        "config.data.batch_size",
        "config.stages.second.accumulate",
        'config.precision="bfloat16"',
    ):
        assert remedy in line


def _fail(error):
    def fail(*args, **kwargs):
        raise error

    return fail


OUT_OF_MEMORY = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\n\tdetails"
)


def _command(hungry, workdir, *arguments):
    return main_lib.main([f"--config={hungry}", f"--workdir={workdir}", *arguments])


def test_evaluation_out_of_memory_names_its_own_batch_size(
    hungry, run_out, monkeypatch, capsys
):
    monkeypatch.setattr(loop, "evaluate", _fail(OUT_OF_MEMORY))
    assert _command(hungry, run_out[0], "--mode=eval") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory while evaluating (RESOURCE_EXHAUSTED: ")
    assert "config.evaluation.batch_size" in err
    assert err.count("\n") == 1 and "details" not in err


def test_the_first_stage_that_is_not_finished_is_named(
    hungry, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(loop, "run", _fail(OUT_OF_MEMORY))
    assert _command(hungry, tmp_path / "run") == 1
    assert "out of memory in stage 'first' (" in capsys.readouterr().err


def test_labelling_out_of_memory_is_one_line(hungry, monkeypatch, capsys, tmp_path):
    from jaxkd.training import labelling

    monkeypatch.setattr(labelling, "label", _fail(OUT_OF_MEMORY))
    assert _command(hungry, tmp_path / "run", "--mode=label") == 1
    err = capsys.readouterr().err
    assert "out of memory while the teachers' answers were computed" in err
    assert err.count("\n") == 1


def test_other_errors_of_the_devices_keep_their_traceback(
    hungry, monkeypatch, tmp_path
):
    monkeypatch.setattr(loop, "run", _fail(jax.errors.JaxRuntimeError("INTERNAL: x")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        _command(hungry, tmp_path / "run")


def test_one_of_several_processes_out_of_memory_blames_no_other(monkeypatch, capsys):
    """What `_run` says stays; the hint at other processes is for other errors."""
    from jaxkd.training import distributed

    monkeypatch.setattr(distributed, "leave", lambda status: None)
    for text, blames in (("RESOURCE_EXHAUSTED: none left", False), ("GONE", True)):
        fail = _fail(jax.errors.JaxRuntimeError(text + "\nmore"))
        assert main_lib._run_with_others(fail) == 1
        err = capsys.readouterr().err
        assert f"error: {text}" in err and err.count("\n") == 1
        assert ("another process" in err) == blames


def test_a_page_that_cannot_be_written_is_one_line(hungry, run_out, capsys):
    workdir, _ = run_out
    # Even root cannot write a file where a folder is.
    (workdir / "report.html").mkdir()
    try:
        assert _command(hungry, workdir, "--mode=report") == 1
    finally:
        (workdir / "report.html").rmdir()
    err = capsys.readouterr().err
    assert err.startswith("error: cannot write the report page: ")
    assert "report.html" in err and err.count("\n") == 1


def test_a_full_disk_under_the_page_is_one_line(hungry, run_out, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    workdir, _ = run_out
    (workdir / "report.html").symlink_to("/dev/full")
    try:
        assert _command(hungry, workdir, "--mode=report") == 1
    finally:
        (workdir / "report.html").unlink()
    err = capsys.readouterr().err
    assert "No space left on device" in err and err.count("\n") == 1
