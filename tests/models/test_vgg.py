"""VGG networks: sizes by closed form and as published, taps, forwards in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models
from jaxkd.analysis import network_costs
from jaxkd.models.vgg import VGG

# Depth, convolutions per stage, published parameters on CIFAR-100 and on ImageNet.
PUBLISHED = {
    8: ((1, 1, 1, 1, 1), 3_965_028, None),
    11: ((1, 1, 2, 2, 2), None, 132_868_840),
    13: ((2, 2, 2, 2, 2), 9_462_180, 133_053_736),
    16: ((2, 2, 3, 3, 3), None, 138_365_992),
    19: ((2, 2, 4, 4, 4), None, 143_678_248),
}
WIDTHS = (64, 128, 256, 512, 512)


def convolutions(sizes):
    """Input and output channels of every convolution, and its stage."""
    channels = 3
    for stage, (size, width) in enumerate(zip(sizes, WIDTHS, strict=True)):
        for _ in range(size):
            yield stage, channels, width
            channels = width


def trunk_parameters(sizes):
    """A kernel, a bias, and a batch norm per convolution."""
    return sum(9 * one * two + 3 * two for _, one, two in convolutions(sizes))


@pytest.mark.parametrize("depth", PUBLISHED)
def test_the_number_of_parameters_on_cifar(depth, count):
    sizes, published, _ = PUBLISHED[depth]
    assert sum(sizes) + 3 == depth  # the fully connected layers count
    expected = trunk_parameters(sizes) + 512 * 100 + 100
    network = models.create(f"vgg{depth}", num_classes=100)
    assert count(network, (32, 32, 3)) == expected
    assert published in (None, expected)


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_the_number_of_parameters_on_imagenet(depth, count):
    sizes, _, published = PUBLISHED[depth]
    linear = (49 * 512 + 1) * 4096 + 4097 * 4096 + 4097 * 1000
    network = models.create(f"vgg{depth}_imagenet", num_classes=1000)
    expected = trunk_parameters(sizes) + linear
    assert count(network, (224, 224, 3)) == expected == published


def test_costs_by_hand():
    sizes, sides = PUBLISHED[11][0], (224, 112, 56, 28, 14)
    macs = sum(9 * one * two * sides[s] ** 2 for s, one, two in convolutions(sizes))
    macs += 49 * 512 * 4096 + 4096 * 4096 + 4096 * 1000
    network = models.create("vgg11_imagenet", num_classes=1000)
    assert network_costs(network, (224, 224, 3)).macs == macs
    assert macs == pytest.approx(7.61e9, rel=1e-2)  # published


def taps(sides, last):
    names = ["stem"]
    names += [f"stage{i}{pre}" for i in range(1, 5) for pre in ("_pre", "")]
    index = [0, 1, 1, 2, 2, 3, 3, 4, 4]
    shapes = [(sides[i], sides[i], WIDTHS[i]) for i in index]
    return [*zip(names, shapes, strict=True), ("pooled", (last,))]


@pytest.mark.parametrize(
    "name, size, sides, last",
    [
        ("vgg8", 32, (32, 16, 8, 4, 4), 512),
        ("vgg8", 64, (64, 32, 16, 8, 4), 512),
        ("vgg11_imagenet", 224, (224, 112, 56, 28, 14), 4096),
        ("vgg11_imagenet", 32, (32, 16, 8, 4, 2), 4096),
    ],
)
def test_taps(name, size, sides, last, abstract):
    _, outputs = abstract(models.create(name, num_classes=7), (size, size, 3))
    found = [(tap, value.shape[1:]) for tap, value in outputs.taps.items()]
    assert found == taps(sides, last)


@pytest.mark.parametrize("hidden", [(), (6, 5)])
def test_forward_equals_numpy(hidden, slow, randomised, quick_jit):
    sizes = (1, 2, 1, 1, 1)
    network = VGG(3, stage_sizes=sizes, stage_widths=(2, 3, 4, 3, 2), hidden=hidden)
    shape = (33, 46, 3)
    v = randomised(network, shape)
    image = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    x, expected = image, []
    for stage, size in enumerate(sizes):
        if stage and (hidden or stage < 4):
            x = slow.pool(x, 2)
        for i in range(size):
            path = f"stage{stage}_conv{i + 1}" if stage else f"stem_conv{i + 1}"
            pre = slow.norm(v, f"{path}/norm", slow.conv(v, f"{path}/conv", x))
            x = slow.relu(pre)
        expected += [x] if stage == 0 else [pre, x]
    if hidden:
        # Maps of 1x1 after the last pool: all 7x7 cells hold the same vector.
        x = slow.pool(x, 2)
        assert x.shape[1:3] == (1, 1)
        x = np.broadcast_to(x, (2, 7, 7, 2)).reshape(2, -1)
        for i in (1, 2):
            layer = jax.tree.map(np.array, v["params"][f"hidden{i}"])
            x = slow.relu(x @ layer["kernel"] + layer["bias"])
    else:
        x = x.mean((1, 2))
    head = jax.tree.map(np.array, v["params"]["head"])
    outputs = quick_jit(network.apply)(v, jnp.array(image))
    for value, reference in zip(outputs.taps.values(), (*expected, x), strict=True):
        np.testing.assert_allclose(value, reference, rtol=2e-4, atol=2e-4)
    logits = x @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(outputs.logits, logits, rtol=2e-4, atol=2e-4)


def test_dropout_acts_in_training_only_and_keeps_the_head_linear(randomised, quick_jit):
    options = {"stage_sizes": (1,) * 5, "stage_widths": (2,) * 5, "hidden": (64, 64)}
    network = VGG(3, dropout=0.5, **options)
    v, x = randomised(network, (32, 32, 3)), jnp.ones((2, 32, 32, 3))
    same = quick_jit(VGG(3, **options).apply)(v, x).logits
    np.testing.assert_array_equal(quick_jit(network.apply)(v, x).logits, same)

    def train(key):
        rngs = {"dropout": key}
        return network.apply(v, x, train=True, rngs=rngs, mutable=["batch_stats"])[0]

    one, two = map(quick_jit(train), jax.random.split(jax.random.key(0)))
    assert not np.array_equal(one.logits, two.logits)
    assert np.mean(np.array(one.taps["pooled"]) == 0) > 0.5
    logits = one.taps["pooled"] @ one.head["kernel"] + one.head["bias"][None]
    np.testing.assert_allclose(one.logits, logits, rtol=1e-5, atol=1e-6)


def test_an_impossible_dropout_is_refused():
    with pytest.raises(ValueError, match="dropout must be >= 0 and < 1, got 1"):
        models.create("vgg11_imagenet", num_classes=2, dropout=1.0)
