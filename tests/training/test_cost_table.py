"""The command that tells what the networks of a config cost."""

import subprocess
import sys

import pytest

from jaxkd.training.cost_table import main

CONFIG = """
from ml_collections import ConfigDict


def get_config(arg=""):
    del arg
    student = dict(name="resnet8", width_factor=0.25)
    sparse = dict(student, compress=dict(static=dict(sparsity=0.75)))
    return ConfigDict(
        dict(
            run=("dense", "sparse"),
            networks=dict(dense=student, sparse=sparse),
            data=dict(source="digits", batch_size=64),
            stages={
                name: dict(
                    method=dict(ce=dict()), epochs=1,
                    optimizer=dict(name="sgd", learning_rate=0.1),
                )
                for name in ("dense", "sparse")
            },
        )
    )
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return f"--config={path}"


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells[2:]}


def test_a_sparse_network_beside_the_dense_one(config, capsys):
    assert main([config, "--network=dense"]) == 0
    dense = capsys.readouterr().out
    assert main([config, "--network=sparse"]) == 0
    sparse = capsys.readouterr().out
    full, thin = rows(dense), rows(sparse)
    assert list(full) == list(thin)
    for path in full:  # masks are no activations
        assert full[path][5:] == thin[path][5:]
    name = "trunk/stage2_block1/conv2"
    assert full[name][1] == "1.000"
    density = float(thin[name][1])
    assert 0.1 < density < 0.4
    assert thin[name][2] == full[name][2]  # multiply-accumulates as they run
    assert float(thin[name][3]) == pytest.approx(
        density * float(full[name][2]), rel=0.05
    )
    assert thin["trunk/stem"][1] == thin["head"][1] == "1.000"
    assert float(thin["**all**"][1]) < 0.5
    assert "XLA counts" in sparse and "dense hardware does not do" in sparse


def test_values_can_be_changed_and_mistakes_are_one_line(config, capsys):
    assert main([config, "--config.networks.dense.width_factor=0.5"]) == 0
    assert "trunk/stem" in capsys.readouterr().out
    assert main([config, "--network=teacher"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "--network: no network 'teacher'; the config has dense, sparse\n"
    )  # fmt: skip
    assert main([config, "--workdir=nowhere"]) == 2
    assert "holds no finished stage" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(config):
    done = subprocess.run(
        [sys.executable, "-m", "jaxkd.analysis.costs", config, "--network=dense"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "**all**" in done.stdout
