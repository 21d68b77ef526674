"""The U-Net++ against its description in numpy, its size and its errors."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models


def node_parameters(inputs, outputs):
    """Two 3x3 convolutions with bias, each with a batch norm."""
    first = 9 * inputs * outputs + 3 * outputs
    return first + 9 * outputs * outputs + 3 * outputs


def analytic_parameters(widths, channels, classes):
    total = node_parameters(channels, widths[0])
    for i in range(1, 5):
        total += node_parameters(widths[i - 1], widths[i])
    for j in range(1, 5):
        for i in range(5 - j):
            total += node_parameters(j * widths[i] + widths[i + 1], widths[i])
    return total + widths[0] * classes + classes


def test_the_published_number_of_parameters(count):
    network = models.create("unetpp", num_classes=2)
    expected = analytic_parameters((64, 128, 256, 512, 1024), 1, 2)
    assert count(network, (384, 384, 1)) == expected == 36_628_546


def test_the_published_taps(abstract):
    _, outputs = abstract(models.create("unetpp", num_classes=2), (384, 384, 1))
    assert {name: tap.shape[1:] for name, tap in outputs.taps.items()} == {
        "e1": (192, 192, 128),
        "e2": (96, 96, 256),
        "e3": (192, 192, 128),
        "e4": (48, 48, 512),
        "e5": (24, 24, 1024),
        "d5": (384, 384, 64),
        "d4": (384, 384, 64),
        "d3": (384, 384, 64),
        "d2": (192, 192, 128),
        "out": (384, 384, 2),
    }
    assert list(outputs.taps) == "e1 e2 e3 e4 e5 d5 d4 d3 d2 out".split()


def test_forward_equals_numpy(slow, randomised, quick_jit):
    network = models.create("unetpp", num_classes=3, width_factor=1 / 32)
    v = randomised(network, (16, 32, 2))
    image = np.random.default_rng(1).normal(size=(2, 16, 32, 2)).astype(np.float32)

    def node(name, *inputs):
        x = np.concatenate(inputs, -1)
        for unit in (f"{name}/unit1", f"{name}/unit2"):
            x = slow.conv(v, f"{unit}/conv", x)
            x = slow.relu(slow.norm(v, f"{unit}/norm", x))
        return x

    def up(x):
        return slow.bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))

    # Written out node by node, diagonal after diagonal.
    x00 = node("node00", image)
    x10 = node("node10", slow.pool(x00, 2))
    x01 = node("node01", x00, up(x10))
    x20 = node("node20", slow.pool(x10, 2))
    x11 = node("node11", x10, up(x20))
    x02 = node("node02", x00, x01, up(x11))
    x30 = node("node30", slow.pool(x20, 2))
    x21 = node("node21", x20, up(x30))
    x12 = node("node12", x10, x11, up(x21))
    x03 = node("node03", x00, x01, x02, up(x12))
    x40 = node("node40", slow.pool(x30, 2))
    x31 = node("node31", x30, up(x40))
    x22 = node("node22", x20, x21, up(x31))
    x13 = node("node13", x10, x11, x12, up(x22))
    x04 = node("node04", x00, x01, x02, x03, up(x13))
    out = slow.conv(v, "head", x04)

    outputs = quick_jit(network.apply)(v, jnp.array(image))
    expected = (x10, x20, x11, x30, x40, x01, x02, x03, x13, out)
    for tap, value in zip(outputs.taps.values(), expected, strict=True):
        np.testing.assert_allclose(tap, value, rtol=2e-4, atol=2e-4)
    np.testing.assert_array_equal(outputs.logits, outputs.taps["out"])


def test_a_size_that_cannot_be_halved_four_times_is_refused(abstract):
    network = models.create("unetpp", num_classes=2, width_factor=1 / 32)
    with pytest.raises(ValueError, match="divisible by 16, got 24x32"):
        abstract(network, (24, 32, 1))
