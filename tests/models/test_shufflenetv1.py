"""ShuffleNet on CIFAR: published size, taps, widths, a forward pass in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models
from jaxkd.analysis import network_costs
from jaxkd.models.shufflenetv1 import ShuffleNetV1


def units():
    """Kernel size, inputs, outputs, groups and stride of every convolution."""
    yield 1, 3, 24, 1, 1
    channels = 24
    for width, blocks in zip((240, 480, 960), (4, 8, 4), strict=True):
        for i in range(blocks):
            added = width - channels if i == 0 else width
            inner = added // 4
            yield 1, channels, inner, 1 if channels == 24 else 3, 1
            yield 3, inner, inner, inner, 2 if i == 0 else 1
            yield 1, inner, added, 3, 1
            channels = width


def test_the_published_number_of_parameters(count):
    expected = sum(k * k * a // g * b + 2 * b for k, a, b, g, _ in units())
    network = models.create("shufflenetv1", num_classes=100)
    assert count(network, (32, 32, 3)) == expected + 960 * 100 + 100 == 949_258


def test_costs_by_hand():
    macs, side = 960 * 100, 32
    for k, inputs, outputs, groups, stride in units():
        side //= stride
        macs += k * k * inputs // groups * outputs * side * side
    network = models.create("shufflenetv1", num_classes=100)
    assert network_costs(network, (32, 32, 3)).macs == macs


def test_taps(abstract):
    _, outputs = abstract(models.create("shufflenetv1", num_classes=7), (32, 32, 3))
    assert [(tap, value.shape[1:]) for tap, value in outputs.taps.items()] == [
        ("stem", (32, 32, 24)),
        *((f"stage1{pre}", (16, 16, 240)) for pre in ("_pre", "")),
        *((f"stage2{pre}", (8, 8, 480)) for pre in ("_pre", "")),
        *((f"stage3{pre}", (4, 4, 960)) for pre in ("_pre", "")),
        ("pooled", (960,)),
    ]


@pytest.mark.parametrize(
    "factor, widths",
    [
        (1.0, (24, 240, 480, 960)),
        (0.5, (12, 120, 240, 480)),
        (1.5, (36, 360, 720, 1440)),
        (0.01, (12, 24, 48, 96)),
    ],
)
def test_every_width_factor_gives_widths_that_the_groups_divide(factor, widths):
    network = models.create("shufflenetv1", num_classes=2, width_factor=factor)
    assert (network.stem_width, *network.stage_widths) == widths


def shuffled(x, groups):
    order = np.arange(x.shape[-1]).reshape(groups, -1).T.ravel()
    return x[..., order]


def mean_3x3(x):
    """The 3x3 mean at stride 2; pixels beyond the edge are zeros that count."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = (n // 2 + n % 2 for n in x.shape[1:3])
    shifts = [
        padded[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2][:, :rows, :columns]
        for i in range(3)
        for j in range(3)
    ]
    return np.mean(shifts, axis=0)


def test_forward_equals_numpy(slow, randomised, quick_jit):
    network = ShuffleNetV1(3, stem_width=12, stage_widths=(24, 48), stage_sizes=(2, 2))
    v = randomised(network, (9, 6, 3))
    image = np.random.default_rng(1).normal(size=(2, 9, 6, 3)).astype(np.float32)

    def unit(path, x, stride=1):
        return slow.norm(v, f"{path}/norm", slow.conv(v, f"{path}/conv", x, stride))

    x = slow.relu(unit("stem", image))
    expected = [x]
    for stage in (1, 2):
        for block in (1, 2):
            path = f"stage{stage}_block{block}"
            groups = 1 if (stage, block) == (1, 1) else 3
            y = shuffled(slow.relu(unit(f"{path}/squeeze", x)), groups)
            y = slow.relu(unit(f"{path}/depthwise", y, 2 if block == 1 else 1))
            y = unit(f"{path}/expand", y)
            pre = np.concatenate([y, mean_3x3(x)], -1) if block == 1 else y + x
            x = slow.relu(pre)
        expected += [pre, x]
    expected.append(x.mean((1, 2)))
    outputs = quick_jit(network.apply)(v, jnp.array(image))
    for tap, value in zip(outputs.taps.values(), expected, strict=True):
        np.testing.assert_allclose(tap, value, rtol=2e-4, atol=2e-4)
