"""CIFAR networks: sizes by independent formulas, and forward passes in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models

# Published numbers of parameters for 100 classes (three input channels).
RESNETS = {
    "resnet8": (8, (16, 16, 32, 64), None),
    "resnet14": (14, (16, 16, 32, 64), None),
    "resnet20": (20, (16, 16, 32, 64), 278_324),
    "resnet32": (32, (16, 16, 32, 64), 472_756),
    "resnet44": (44, (16, 16, 32, 64), None),
    "resnet56": (56, (16, 16, 32, 64), 861_620),
    "resnet110": (110, (16, 16, 32, 64), 1_736_564),
    "resnet8x4": (8, (32, 64, 128, 256), 1_233_540),
    "resnet32x4": (32, (32, 64, 128, 256), 7_433_860),
}
WIDE = {
    "wrn_16_2": (16, 2, 703_284),
    "wrn_40_1": (40, 1, 569_780),
    "wrn_40_2": (40, 2, 2_255_156),
    "wrn_16_1": (16, 1, None),
    "wrn_16_4": (16, 4, None),
    "wrn_28_2": (28, 2, None),
    "wrn_28_4": (28, 4, None),
    "wrn_28_10": (28, 10, None),
    "wrn_40_4": (40, 4, None),
}


def resnet_parameters(depth, widths, classes):
    """In closed form: n blocks a stage, of which the first may have a shortcut."""
    n = (depth - 2) // 6
    stem, *stages = widths
    total = 27 * stem + 2 * stem
    for before, width in zip((stem, *stages), stages, strict=False):
        kernels = 9 * before * width + (2 * n - 1) * 9 * width**2
        shortcut = before * width + 2 * width if before != width else 0
        total += kernels + 2 * n * 2 * width + shortcut
    return total + stages[-1] * classes + classes


def wide_parameters(depth, k, classes):
    """In closed form: norms come before convolutions; shortcuts have none."""
    n = (depth - 4) // 6
    stages = [16 * k, 32 * k, 64 * k]
    total = 27 * 16
    for before, width in zip((16, *stages), stages, strict=False):
        total += 9 * before * width + (2 * n - 1) * 9 * width**2
        total += 2 * before + (2 * n - 1) * 2 * width
        total += before * width if before != width else 0
    return total + 2 * stages[-1] + stages[-1] * classes + classes


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_have_the_published_number_of_parameters(name, count):
    depth, widths, published = RESNETS[name]
    expected = resnet_parameters(depth, widths, 100)
    assert count(models.create(name, num_classes=100), (32, 32, 3)) == expected
    assert published in (None, expected)


@pytest.mark.parametrize("name", WIDE)
def test_wide_resnets_have_the_published_number_of_parameters(name, count):
    depth, k, published = WIDE[name]
    expected = wide_parameters(depth, k, 100)
    assert count(models.create(name, num_classes=100), (32, 32, 3)) == expected
    assert published in (None, expected)


@pytest.mark.parametrize(
    "name, stem, width",
    [("resnet8x4", 32, 64), ("resnet8", 16, 16), ("wrn_16_2", 16, 32)],
)
def test_taps(name, stem, width, abstract):
    _, outputs = abstract(models.create(name, num_classes=100), (32, 32, 3))
    assert [(tap, value.shape[1:]) for tap, value in outputs.taps.items()] == [
        ("stem", (32, 32, stem)),
        ("stage1_pre", (32, 32, width)),
        ("stage1", (32, 32, width)),
        ("stage2_pre", (16, 16, 2 * width)),
        ("stage2", (16, 16, 2 * width)),
        ("stage3_pre", (8, 8, 4 * width)),
        ("stage3", (8, 8, 4 * width)),
        ("pooled", (4 * width,)),
    ]


def head(v, x):
    kernel, bias = v["params"]["head"]["kernel"], v["params"]["head"]["bias"]
    return x @ np.array(kernel) + np.array(bias)


TAPS = ("stem", "stage1", "stage2", "stage3", "pooled")


def test_a_resnet_equals_numpy(slow, randomised, quick_jit):
    network = models.create("resnet14", num_classes=5, width_factor=0.25)
    v = randomised(network, (8, 8, 3))
    image = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    x = slow.relu(slow.norm(v, "trunk/stem_norm", slow.conv(v, "trunk/stem", image)))
    expected = [x]
    for stage in (1, 2, 3):
        for block in (1, 2):
            stride = 2 if stage > 1 and block == 1 else 1
            x = slow.basic_block(v, f"trunk/stage{stage}_block{block}", x, stride)
        expected.append(x)
    expected.append(x.mean((1, 2)))
    outputs = quick_jit(network.apply)(v, jnp.array(image))
    for name, value in zip(TAPS, expected, strict=True):
        np.testing.assert_allclose(outputs.taps[name], value, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(outputs.logits, head(v, expected[-1]), atol=2e-4)


def test_a_wide_resnet_equals_numpy(slow, randomised, quick_jit):
    network = models.create("wrn_16_2", num_classes=5, width_factor=0.125)
    v = randomised(network, (8, 8, 3))
    image = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    x = slow.conv(v, "stem", image)
    expected = [x]
    for stage in (1, 2, 3):
        for block in (1, 2):
            path = f"stage{stage}_block{block}"
            stride = 2 if stage > 1 and block == 1 else 1
            active = slow.relu(slow.norm(v, f"{path}/norm1", x))
            y = slow.conv(v, f"{path}/conv1", active, stride)
            y = slow.relu(slow.norm(v, f"{path}/norm2", y))
            y = slow.conv(v, f"{path}/conv2", y)
            if block == 1:  # the width changes: the shortcut sees the activation
                x = slow.conv(v, f"{path}/shortcut", active, stride)
            x = x + y
        expected.append(x)
    # What the batch norm after each stage makes of it.
    after = ("stage2_block1/norm1", "stage3_block1/norm1", "norm")
    pre = [slow.norm(v, *z) for z in zip(after, expected[1:], strict=True)]
    expected.append(slow.relu(pre[-1]).mean((1, 2)))
    outputs = quick_jit(network.apply)(v, jnp.array(image))
    for name, value in zip(TAPS, expected, strict=True):
        np.testing.assert_allclose(outputs.taps[name], value, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(outputs.logits, head(v, expected[-1]), atol=2e-4)
    for stage, value in enumerate(pre, start=1):
        tap = outputs.taps[f"stage{stage}_pre"]
        np.testing.assert_allclose(tap, value, rtol=2e-4, atol=2e-4)


def test_norms_of_a_wide_resnet_are_those_that_make_its_pre_taps(randomised, quick_jit):
    network = models.create("wrn_16_1", num_classes=5, width_factor=0.125)
    v = randomised(network, (8, 8, 3))
    outputs = quick_jit(network.apply)(v, jnp.ones((2, 8, 8, 3)))
    p = v["params"]
    expected = {
        "stage1_pre": p["stage2_block1"]["norm1"],
        "stage2_pre": p["stage3_block1"]["norm1"],
        "stage3_pre": p["norm"],
    }
    assert list(outputs.norms) == list(expected)
    for name, norm in expected.items():
        jax.tree.map(np.testing.assert_array_equal, outputs.norms[name], norm)
    pooled = np.maximum(outputs.taps["stage3_pre"], 0).mean((1, 2))
    np.testing.assert_allclose(outputs.taps["pooled"], pooled, rtol=1e-5)
    logits = pooled @ np.array(outputs.head["kernel"]) + np.array(outputs.head["bias"])
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-4, atol=1e-5)
