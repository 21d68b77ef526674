"""bench/step.py: what it prints, what is compared, what it refuses."""

import json
import math

import pytest

TINY = (
    "--teacher=resnet8 --student=resnet8 --batch-size=4 --image-size=8 "
    "--steps=2 --rounds=2 --threads=1"
).split()
KEYS = {
    "benchmark",
    "ratio",
    "ratios",
    "jax_images_per_second",
    "torch_images_per_second",
    "sides",
    "flops_per_step",
    "ceiling_flops_per_second",
    "threads",
    "device",
    "load",
    "versions",
    "rounds",
    "steps",
    "steps_per_call",
    "teacher",
    "student",
    "parameters",
    "batch_size",
    "image_size",
    "classes",
    "dtype",
}


@pytest.fixture(scope="module")
def step(script):
    return script("step")


def test_jaxkd_alone_prints_one_json_line_with_the_promised_keys(run_script):
    done = run_script("step.py", "--peer=none", "--steps-per-call=2", *TINY)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result.keys() == KEYS
    assert result["ratio"] is None and result["ratios"] == {}
    assert result["torch_images_per_second"] is None
    assert result["jax_images_per_second"] == result["sides"]["jax"]["median"] > 0
    assert len(result["sides"]["jax"]["rounds"]) == result["rounds"] == 2
    assert result["sides"]["jax"]["ceiling_share"] > 0
    assert result["flops_per_step"] > 0
    assert result["threads"] == 1
    assert result["device"].startswith("cpu")
    assert {"python", "jaxkd", "jax", "flax"} <= result["versions"].keys()
    assert result["parameters"] == {
        "teacher": cifar_resnet_parameters(8, (16, 16, 32, 64), classes=100),
        "student": cifar_resnet_parameters(8, (16, 16, 32, 64), classes=100),
    }


def cifar_resnet_parameters(depth, channels, *, classes):
    """Counted by hand: 3x3 kernels, two values per normalised channel, shortcuts."""
    stem, *stages = channels
    total, before = 27 * stem + 2 * stem, stem
    for width in stages:
        for _ in range((depth - 2) // 6):
            total += 9 * before * width + 9 * width * width + 4 * width
            if before != width:
                total += before * width + 2 * width
            before = width
    return total + before * classes + classes


def test_missing_torch_ends_in_one_line_that_names_the_extra(step, capsys, monkeypatch):
    monkeypatch.setitem(step.sys.modules, "torch", None)
    assert step.main(TINY) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert "pip install 'jaxkd[bench]'" in line


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--rounds=0", "--rounds must be at least 1"),
        ("--batch-size=0", "--batch-size must be at least 1"),
        ("--threads=9999", "may use"),
        ("--peer=tensorflow", "no peer 'tensorflow'"),
        ("--precision=float16", "invalid choice"),
        ("--steps-per-call=2", "does not divide --steps 3"),
        ("--student=resnet9", "no network 'resnet9'"),
    ],
)
def test_impossible_options_end_with_status_2_and_one_line(
    step, capsys, argument, message
):
    peer = [] if argument.startswith("--peer") else ["--peer=none"]
    assert step.main([*peer, argument]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err.splitlines()[-1]


def test_the_ratio_is_jaxkd_over_torch_of_medians(step):
    options = step.parse(["--rounds=3", "--batch-size=10", "--peer=torch,torch_graphs"])
    rates = {
        "jax": [10.0, 30.0, 20.0],
        "torch": [40.0, 41.0, 900.0],
        "torch_graphs": [10.0, 10.0, 10.0],
    }
    result = step.summarise(
        options,
        rates,
        parameters={"teacher": 2, "student": 1},
        flops_per_step=100.0,
        ceiling=1000.0,
    )
    assert result.keys() == KEYS - {"device", "load", "versions"}
    assert result["jax_images_per_second"] == 20.0
    assert result["torch_images_per_second"] == 41.0
    assert math.isclose(result["ratio"], 20 / 41, abs_tol=1e-4)
    assert result["ratios"] == {"torch": result["ratio"], "torch_graphs": 2.0}
    # Two steps of ten images in a second.
    assert result["sides"]["jax"]["flops_per_second"] == 200.0
    assert result["sides"]["jax"]["ceiling_share"] == 0.2


def test_networks_of_different_sizes_are_refused(step):
    same = {"teacher": 2, "student": 1}
    step.check_parameters({"jax": same, "torch": dict(same)})
    with pytest.raises(ValueError, match="networks differ"):
        step.check_parameters({"jax": same, "torch": {"teacher": 2, "student": 3}})


def test_a_pair_sets_what_no_option_says(step):
    options = step.parse([])
    assert (options.teacher, options.student) == ("resnet32x4", "resnet8x4")
    assert (options.batch_size, options.image_size, options.classes) == (64, 32, 100)
    assert (options.peers, options.precision) == (("torch",), "float32")
    assert (options.steps, options.steps_per_call) == (3, 1)
    large = step.parse(["--pair=imagenet", "--device=gpu", "--batch-size=32"])
    assert (large.teacher, large.student) == ("resnet50", "resnet18")
    assert (large.batch_size, large.image_size, large.classes) == (32, 224, 1000)
    assert large.peers == ("torch", "torch_compile", "torch_graphs")


@pytest.mark.slow
def test_both_sides_train_networks_of_equal_size_in_one_run(run_script):
    pytest.importorskip("torch")
    done = run_script("step.py", *TINY)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["ratio"] > 0
    sides = result["sides"]
    assert len(sides["torch"]["rounds"]) == len(sides["jax"]["rounds"]) == 2


@pytest.mark.slow
def test_torch_computes_in_mixed_precision_and_on_large_images(run_script):
    pytest.importorskip("torch")
    done = run_script(
        "step.py",
        *("--pair=imagenet", "--teacher=resnet18", "--image-size=32", "--batch-size=2"),
        *("--steps=1", "--rounds=1", "--precision=bfloat16", "--classes=5"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ratios"]["torch"] > 0
