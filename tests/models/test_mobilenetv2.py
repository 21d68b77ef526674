"""MobileNetV2: published sizes and costs, taps, a forward pass in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models
from jaxkd.analysis import network_costs
from jaxkd.models.mobilenetv2 import MobileNetV2

# Expansion, channels, blocks, stride (Sandler et al., 2018, table 2).
TABLE = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


def units(widths, strides, last, expands_all):
    """Kernel size, inputs, outputs, groups and stride of every convolution."""
    before, *widths = widths
    yield 3, 3, before, 1, 2
    for (expansion, _, blocks, _), width, stride in zip(
        TABLE, widths, strides, strict=True
    ):
        for i in range(blocks):
            hidden = expansion * before
            if expansion > 1 or expands_all:
                yield 1, before, hidden, 1, 1
            yield 3, hidden, hidden, hidden, stride if i == 0 else 1
            yield 1, hidden, width, 1, 1
            before = width
    yield 1, before, last, 1, 1


def parameters(convolutions, last, classes):
    total = sum(k * k * a // g * b + 2 * b for k, a, b, g, _ in convolutions)
    return total + last * classes + classes


def macs(convolutions, side, last, classes):
    total = last * classes
    for k, inputs, outputs, groups, stride in convolutions:
        side //= stride
        total += k * k * inputs // groups * outputs * side * side
    return total


IMAGENET = list(
    units((32, *(row[1] for row in TABLE)), [row[3] for row in TABLE], 1280, False)
)
CIFAR = list(
    units((16, *(row[1] // 2 for row in TABLE)), (1, 1, 2, 2, 1, 2, 1), 1280, True)
)


def test_published_numbers_of_parameters(count):
    network = models.create("mobilenetv2", num_classes=1000)
    expected = parameters(IMAGENET, 1280, 1000)
    assert count(network, (224, 224, 3)) == expected == 3_504_872
    network = models.create("mobilenetv2_cifar", num_classes=100)
    expected = parameters(CIFAR, 1280, 100)
    assert count(network, (32, 32, 3)) == expected == 812_836


@pytest.mark.parametrize(
    "factor, published", [(0.5, 1_968_680), (0.75, 2_636_424), (1.4, 6_108_776)]
)
def test_the_width_factor_follows_the_published_rounding(factor, published, count):
    network = models.create("mobilenetv2", num_classes=1000, width_factor=factor)
    assert count(network, (224, 224, 3)) == published


def test_costs_by_hand():
    network = models.create("mobilenetv2", num_classes=1000)
    expected = macs(IMAGENET, 224, 1280, 1000)
    assert network_costs(network, (224, 224, 3)).macs == expected
    assert expected == pytest.approx(300.8e6, rel=1e-3)  # published
    network = models.create("mobilenetv2_cifar", num_classes=100)
    assert network_costs(network, (32, 32, 3)).macs == macs(CIFAR, 32, 1280, 100)


def test_the_cifar_network_is_scaled_in_all_widths():
    network = models.create("mobilenetv2_cifar", num_classes=2, width_factor=0.25)
    assert [width for _, width, _, _ in network.groups] == [2, 3, 4, 8, 12, 20, 40]
    assert (network.stem_width, network.last_width) == (4, 320)


@pytest.mark.parametrize(
    "name, size, sides, widths",
    [
        ("mobilenetv2", 224, (112, 56, 28, 14, 7), (32, 24, 32, 96, 320)),
        ("mobilenetv2_cifar", 32, (16, 16, 8, 4, 2), (16, 12, 16, 48, 160)),
    ],
)
def test_taps(name, size, sides, widths, abstract):
    _, outputs = abstract(models.create(name, num_classes=7), (size, size, 3))
    maps = {
        tap: (side, side, width)
        for tap, side, width in zip(
            ("stem", "stage1", "stage2", "stage3", "stage4"), sides, widths, strict=True
        )
    }
    maps["pooled"] = (1280,)
    found = {tap: value.shape[1:] for tap, value in outputs.taps.items()}
    assert {tap: v for tap, v in found.items() if not tap.endswith("_pre")} == maps
    assert [found[f"stage{i}_pre"] for i in (1, 2, 3, 4)] == [
        found[f"stage{i}"] for i in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("expands_all", [False, True])
def test_forward_equals_numpy(expands_all, slow, randomised, quick_jit):
    table = ((1, 3, 1, 1), *((2, width, 2, 2) for width in (2, 3, 4, 4, 5, 3)))
    relu = jax.nn.relu if expands_all else jax.nn.relu6
    options = {"activation": relu, "expands_all": expands_all}
    network = MobileNetV2(3, stem_width=3, groups=table, last_width=5, **options)
    v = randomised(network, (35, 18, 3))
    image = np.random.default_rng(1).normal(size=(2, 35, 18, 3)).astype(np.float32)
    image *= 9  # beyond the cut of ReLU6
    clip = 1e9 if expands_all else 6

    def unit(path, x, stride=1, active=True):
        x = slow.norm(v, f"{path}/norm", slow.conv(v, f"{path}/conv", x, stride))
        return x.clip(0, clip) if active else x

    x = unit("stem", image, 2)
    expected = {"stem": x}
    tapped = {2: "stage1", 3: "stage2", 5: "stage3", 7: "stage4"}
    for group, (expansion, width, blocks, stride) in enumerate(table, start=1):
        for i in range(blocks):
            path = f"group{group}_block{i + 1}"
            expands = expands_all or expansion > 1
            y = unit(f"{path}/expand", x) if expands else x
            y = unit(f"{path}/depthwise", y, stride if i == 0 else 1)
            y = unit(f"{path}/project", y, active=False)
            same = x.shape[-1] == width and (stride == 1 or i > 0)
            x = x + y if same else y
        if group in tapped:
            expected[tapped[group]] = expected[f"{tapped[group]}_pre"] = x
    expected["pooled"] = unit("last", x).mean((1, 2))
    outputs = quick_jit(network.apply)(v, jnp.array(image))
    assert outputs.taps.keys() == expected.keys()
    for tap, value in expected.items():
        np.testing.assert_allclose(outputs.taps[tap], value, rtol=2e-3, atol=2e-3)
    assert expected["stem"].max() == 6 or expands_all
