"""HLFD's student against its description in numpy, and its size."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import models


def test_the_published_number_of_parameters(count):
    # torchvision's ResNet-18 has 11,689,512 with its classifier of 1000 classes.
    trunk = 11_689_512 - (512 * 1000 + 1000)
    network = models.create("resnet18_seg", num_classes=2)
    assert count(network, (384, 384, 1)) == trunk + 512 * 2 + 2 == 11_177_538


def test_the_published_taps(abstract):
    network = models.create("resnet18_seg", num_classes=2)
    _, outputs = abstract(network, (384, 384, 1))
    assert {name: tap.shape[1:] for name, tap in outputs.taps.items()} == {
        "e1": (192, 192, 64),
        "e2": (96, 96, 64),
        "e3": (48, 48, 128),
        "e4": (24, 24, 256),
        "e5": (12, 12, 512),
        "d5": (384, 384, 256),
        "d4": (384, 384, 128),
        "d3": (384, 384, 64),
        "d2": (384, 384, 64),
        "out": (384, 384, 2),
    }
    assert list(outputs.taps) == "e1 e2 e3 e4 e5 d5 d4 d3 d2 out".split()


def test_forward_equals_numpy(slow, randomised, quick_jit):
    network = models.create("resnet18_seg", num_classes=2, width_factor=1 / 16)
    v = randomised(network, (32, 64, 1))
    image = np.random.default_rng(1).normal(size=(2, 32, 64, 1)).astype(np.float32)

    x = slow.conv(v, "trunk/stem", np.concatenate([image] * 3, -1), 2)
    maps = [slow.relu(slow.norm(v, "trunk/stem_norm", x))]
    x = slow.pool(maps[0], 3, padding=1)
    for stage in (1, 2, 3, 4):
        for block in (1, 2):
            stride = 2 if stage > 1 and block == 1 else 1
            x = slow.basic_block(v, f"trunk/stage{stage}_block{block}", x, stride)
        maps.append(x)
    logits = slow.conv(v, "head", maps[-1])
    expected = maps + [slow.bilinear(y, (32, 64)) for y in (*maps[3::-1], logits)]

    outputs = quick_jit(network.apply)(v, jnp.array(image))
    for tap, value in zip(outputs.taps.values(), expected, strict=True):
        np.testing.assert_allclose(tap, value, rtol=2e-4, atol=2e-4)
    np.testing.assert_array_equal(outputs.logits, outputs.taps["out"])


def test_any_image_size_gives_logits_of_that_size(abstract):
    network = models.create("resnet18_seg", num_classes=3, width_factor=1 / 16)
    for size in ((8, 8), (50, 37)):
        _, outputs = abstract(network, (*size, 1))
        assert outputs.logits.shape == (1, *size, 3)


def test_colour_images_are_taken_as_they_are(abstract):
    network = models.create("resnet18_seg", num_classes=2, width_factor=1 / 16)
    grey, _ = abstract(network, (32, 32, 1))
    colour, _ = abstract(network, (32, 32, 3))
    assert jax.tree.map(jnp.shape, grey) == jax.tree.map(jnp.shape, colour)
