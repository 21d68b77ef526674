"""The U-Net against its description in numpy, its size and its errors."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models


def conv_unit(inputs, outputs):
    """Parameters of a 3x3 convolution with bias and a batch norm."""
    return 9 * inputs * outputs + outputs + 2 * outputs


def analytic_parameters(widths, channels, classes):
    total = 0
    for inputs, outputs in zip((channels, *widths), widths, strict=False):
        total += conv_unit(inputs, outputs) + conv_unit(outputs, outputs)
    for fine, coarse in zip(widths, widths[1:], strict=False):
        total += conv_unit(coarse, fine)
        total += conv_unit(2 * fine, fine) + conv_unit(fine, fine)
    return total + widths[0] * classes + classes


def test_the_published_number_of_parameters(count):
    network = models.create("unet", num_classes=2)
    expected = analytic_parameters((64, 128, 256, 512, 1024), 1, 2)
    assert count(network, (384, 384, 1)) == expected == 34_525_954


def test_the_published_taps(abstract):
    _, outputs = abstract(models.create("unet", num_classes=2), (384, 384, 1))
    assert {name: tap.shape[1:] for name, tap in outputs.taps.items()} == {
        "e1": (384, 384, 64),
        "e2": (192, 192, 128),
        "e3": (96, 96, 256),
        "e4": (48, 48, 512),
        "e5": (24, 24, 1024),
        "d5": (48, 48, 512),
        "d4": (96, 96, 256),
        "d3": (192, 192, 128),
        "d2": (384, 384, 64),
        "out": (384, 384, 2),
    }
    assert list(outputs.taps) == "e1 e2 e3 e4 e5 d5 d4 d3 d2 out".split()


def test_forward_equals_numpy(slow, randomised, quick_jit):
    network = models.create("unet", num_classes=3, width_factor=1 / 32)
    v = randomised(network, (32, 16, 2))
    x = np.random.default_rng(1).normal(size=(2, 32, 16, 2)).astype(np.float32)

    def unit(path, x):
        return slow.relu(slow.norm(v, f"{path}/norm", slow.conv(v, f"{path}/conv", x)))

    def node(path, x):
        return unit(f"{path}/unit2", unit(f"{path}/unit1", x))

    expected = {"e1": node("encoder1", x)}
    for i in range(2, 6):
        expected[f"e{i}"] = node(f"encoder{i}", slow.pool(expected[f"e{i - 1}"], 2))
    y = expected["e5"]
    for i in (5, 4, 3, 2):
        up = unit(f"up{i}", slow.nearest_double(y))
        y = node(f"decoder{i}", np.concatenate([expected[f"e{i - 1}"], up], -1))
        expected[f"d{i}"] = y
    expected["out"] = slow.conv(v, "head", y)

    outputs = quick_jit(network.apply)(v, jnp.array(x))
    assert outputs.taps.keys() == expected.keys()
    for name, tap in outputs.taps.items():
        np.testing.assert_allclose(tap, expected[name], rtol=2e-4, atol=2e-4)
    np.testing.assert_array_equal(outputs.logits, outputs.taps["out"])


def test_a_size_that_cannot_be_halved_four_times_is_refused(abstract):
    network = models.create("unet", num_classes=2, width_factor=1 / 32)
    with pytest.raises(ValueError, match="unet needs a height and width divisible by"):
        abstract(network, (32, 40, 1))
