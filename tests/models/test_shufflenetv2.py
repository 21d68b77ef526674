"""ShuffleNetV2: published sizes, both stems, taps, a forward pass in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models
from jaxkd.analysis import network_costs
from jaxkd.models.shufflenetv2 import ShuffleNetV2

# Stage widths, last width, published parameters on ImageNet and on CIFAR-100.
PUBLISHED = {
    "x0_5": ((48, 96, 192), 1024, 1_366_792, None),
    "x1_0": ((116, 232, 464), 1024, 2_278_604, 1_355_528),
    "x1_5": ((176, 352, 704), 1024, 3_503_624, None),
    "x2_0": ((244, 488, 976), 2048, 7_393_996, None),
}


def units(widths, last, stem):
    """Kernel size, inputs, outputs, groups and side (of 1 / side) of convolutions."""
    large = stem == "imagenet"
    yield (3, 3, 24, 1, 2) if large else (1, 3, 24, 1, 1)
    channels, side = 24, 4 if large else 1
    for width, blocks in zip(widths, (4, 8, 4), strict=True):
        half = width // 2
        yield 3, channels, channels, channels, 2 * side
        yield 1, channels, half, 1, 2 * side
        for i in range(blocks):
            yield 1, half if i else channels, half, 1, 2 * side if i else side
            yield 3, half, half, half, 2 * side
            yield 1, half, half, 1, 2 * side
        channels, side = width, 2 * side
    yield 1, channels, last, 1, side


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("stem, pixels", [("imagenet", 224), ("cifar", 32)])
def test_the_number_of_parameters(size, stem, pixels, count):
    widths, last, large, small = PUBLISHED[size]
    classes, published = (1000, large) if stem == "imagenet" else (100, small)
    network = models.create(f"shufflenetv2_{size}", num_classes=classes, stem=stem)
    expected = sum(
        k * k * a // g * b + 2 * b for k, a, b, g, _ in units(widths, last, stem)
    )
    expected += last * classes + classes
    assert count(network, (pixels, pixels, 3)) == expected
    assert published in (None, expected)


def test_costs_by_hand():
    macs = 1024 * 1000 + sum(
        k * k * a // g * b * (224 // side) ** 2
        for k, a, b, g, side in units((116, 232, 464), 1024, "imagenet")
    )
    network = models.create("shufflenetv2_x1_0", num_classes=1000)
    assert network_costs(network, (224, 224, 3)).macs == macs
    assert macs == pytest.approx(146e6, rel=1e-2)  # published


@pytest.mark.parametrize(
    "stem, size, sides",
    [("imagenet", 224, (112, 28, 14, 7)), ("cifar", 32, (32, 16, 8, 4))],
)
def test_taps(stem, size, sides, abstract):
    network = models.create("shufflenetv2_x1_0", num_classes=7, stem=stem)
    _, outputs = abstract(network, (size, size, 3))
    assert [(tap, value.shape[1:]) for tap, value in outputs.taps.items()] == [
        ("stem", (sides[0], sides[0], 24)),
        *((f"stage1{pre}", (sides[1], sides[1], 116)) for pre in ("_pre", "")),
        *((f"stage2{pre}", (sides[2], sides[2], 232)) for pre in ("_pre", "")),
        *((f"stage3{pre}", (sides[3], sides[3], 464)) for pre in ("_pre", "")),
        ("pooled", (1024,)),
    ]


@pytest.mark.parametrize("factor", [0.01, 0.3, 2.0])
def test_stage_widths_stay_even(factor):
    network = models.create("shufflenetv2_x1_0", num_classes=2, width_factor=factor)
    for width, full in zip(network.stage_widths, (116, 232, 464), strict=True):
        assert width % 2 == 0 and abs(width - factor * full) <= 2


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_forward_equals_numpy(stem, slow, randomised, quick_jit):
    options = {"stage_widths": (6, 8), "stage_sizes": (2, 2), "last_width": 5}
    network = ShuffleNetV2(3, stem_width=3, stem=stem, **options)
    v = randomised(network, (21, 14, 3))
    image = np.random.default_rng(1).normal(size=(2, 21, 14, 3)).astype(np.float32)

    def unit(path, x, stride=1):
        return slow.norm(v, f"{path}/norm", slow.conv(v, f"{path}/conv", x, stride))

    def shuffled(*halves):
        """The halves' channels in turn."""
        return np.stack(halves, axis=-1).reshape(*halves[0].shape[:-1], -1)

    x = slow.relu(unit("stem_unit", image, 2 if stem == "imagenet" else 1))
    expected = [x]
    if stem == "imagenet":
        x = slow.pool(x, 3, padding=1)
    for stage in (1, 2):
        for block in (1, 2):
            path, stride = f"stage{stage}_block{block}", 2 if block == 1 else 1
            if stride == 2:
                side = unit(f"{path}/side_depthwise", x, 2)
                side, y = unit(f"{path}/side_expand", side), x
            else:
                side, y = np.split(x, 2, axis=-1)
            y = slow.relu(unit(f"{path}/squeeze", y))
            y = unit(f"{path}/expand", unit(f"{path}/depthwise", y, stride))
            pre, x = shuffled(side, y), shuffled(slow.relu(side), slow.relu(y))
        expected += [pre, x]
    expected.append(slow.relu(unit("last", x)).mean((1, 2)))
    outputs = quick_jit(network.apply)(v, jnp.array(image))
    for tap, value in zip(outputs.taps.values(), expected, strict=True):
        np.testing.assert_allclose(tap, value, rtol=2e-4, atol=2e-4)
