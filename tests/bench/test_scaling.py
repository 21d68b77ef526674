"""bench/scaling.py: traffic counted by hand, and processes that take turns."""

import json
import subprocess
import sys
import types

import pytest

NETWORK = """
import flax.linen as nn
from jaxkd.layers import Outputs

class Network(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Dense(128, use_bias=False)(images[:, ::8, ::8].reshape(len(images), -1))
        x = nn.Dense(self.num_classes, use_bias=False)(nn.relu(x))
        return Outputs(logits=x, taps={})

def make(*, num_classes):
    return Network(num_classes)
"""
# 4 x 4 pixels of 3 channels to 128 features, to 100 classes.
KERNELS = [4 * 48 * 128, 4 * 128 * 100]


@pytest.fixture(scope="module")
def scaling(script):
    return script("scaling")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A network that processes of their own can import."""
    folder = tmp_path_factory.mktemp("network")
    (folder / "jaxkd_bench_scaling.py").write_text(NETWORK)
    sys.path.append(str(folder))
    yield "jaxkd_bench_scaling:make-jaxkd_bench_scaling:make"
    sys.path.remove(str(folder))


def run(scaling, capsys, *arguments):
    assert scaling.main(arguments) == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def test_traffic_is_that_of_gradients_and_gathered_kernels(scaling, pair, capsys):
    arguments = (f"--pair={pair}", "--batch-size=8", "--devices", "4")
    result, said = run(scaling, capsys, *arguments, "--rounds=0")
    assert result["benchmark"] == "scaling" and result["simulated"] is True
    assert result["ratio"] is None
    found = {(t["devices"], t["mesh"]): t for t in result["traffic"]}
    assert list(found) == [(4, mesh) for mesh in scaling.MESHES]
    data, fsdp, teacher = found.values()
    # Two gradients and the means of two terms.
    summed = sum(KERNELS) + 2 * 4
    assert data["collectives"]["all-reduce"]["arrays"] == 4
    assert data["bytes"] == summed
    assert data["sent_bytes"] == 2 * 3 / 4 * summed
    # The kernels are gathered; the norms of gradient and update come in parts.
    assert fsdp["collectives"]["all-gather"]["bytes"] == sum(KERNELS)
    assert fsdp["bytes"] == summed + sum(KERNELS) + 2 * 2 * 4
    assert teacher["bytes"] == fsdp["bytes"] + sum(KERNELS)
    # A quarter of the kernels and of their moments; the rest are a few numbers.
    whole, part = (t["bytes_per_device"] for t in (data, fsdp))
    assert whole["teachers"] == part["teachers"] == sum(KERNELS)
    assert whole["state"] - part["state"] == 2 * 3 / 4 * sum(KERNELS)
    assert teacher["bytes_per_device"]["teachers"] == sum(KERNELS) / 4
    assert said.count("in collectives (simulated)") == 3


def test_one_and_two_processes_take_turns(scaling, pair, capsys):
    arguments = (f"--pair={pair}", "--batch-size=8", "--devices", "1")
    result, said = run(scaling, capsys, *arguments, "--rounds=2", "--steps=1")
    # One device sends nothing, and has one mesh only.
    (alone,) = result["traffic"]
    assert (alone["mesh"], alone["bytes"], alone["collectives"]) == ("data", 0, {})
    assert result["ratio"] > 0 and list(result["seconds_per_step"]) == ["1", "2"]
    for times in result["seconds_per_step"].values():
        assert len(times["rounds"]) == 2 and 0 < times["low"] <= times["high"]
    assert "round 2 of 2, seconds per step by number of processes (simulated)" in said


def test_the_ratio_says_how_much_longer_two_processes_take(scaling):
    found = scaling._compared({"1": [1.0, 2.0, 9.0], "2": [3.0, 5.0, 4.0]})
    assert found["ratio"] == 2.0
    assert found["seconds_per_step"]["1"]["median"] == 2.0


def test_a_process_that_ends_early_is_a_mistake(scaling):
    process = subprocess.Popen(
        [sys.executable, "-c", "print('[Gloo] hello')"],
        stdout=subprocess.PIPE,
        text=True,
    )
    with pytest.raises(Exception, match="a process ended early"):
        scaling._answer(process)
    process.communicate()


def test_what_a_process_says_in_between_is_passed_over(scaling):
    lines = iter(["[Gloo] Rank 0 is connected\n", "seconds 1.5\n"])
    assert scaling._answer(types.SimpleNamespace(stdout=lines)) == 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size=12"], "--batch-size 12 does not split over 8 devices"),
        (["--batch-size=9", "--devices", "3"], "does not split over 2 devices"),
        (["--devices", "0"], "does not split over 0 devices"),
        (["--steps=0"], "--steps must be at least 1"),
        (["--pair=resnet8"], "TEACHER-STUDENT"),
    ],
)
def test_impossible_options_end_with_status_2(scaling, capsys, arguments, message):
    assert scaling.main(arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
