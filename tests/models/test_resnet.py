"""ImageNet residual networks: sizes of torchvision's, taps and the two stems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models

SIZES = {
    "resnet18": ((2, 2, 2, 2), 1, 11_689_512),
    "resnet34": ((3, 4, 6, 3), 1, 21_797_672),
    "resnet50": ((3, 4, 6, 3), 4, 25_557_032),
    "resnet101": ((3, 4, 23, 3), 4, 44_549_160),
    "resnet152": ((3, 8, 36, 3), 4, 60_192_808),
}


def analytic_parameters(sizes, expansion, classes):
    """Counted kernel by kernel; a convolution is followed by a batch norm."""

    def unit(k, inputs, outputs):
        return k * k * inputs * outputs + 2 * outputs

    total, inputs = unit(7, 3, 64), 64
    for stage, blocks in enumerate(sizes):
        width = 64 * 2**stage
        for block in range(blocks):
            if expansion == 1:
                total += unit(3, inputs, width) + unit(3, width, width)
            else:
                total += unit(1, inputs, width) + unit(3, width, width)
                total += unit(1, width, 4 * width)
            if block == 0 and inputs != expansion * width:
                total += unit(1, inputs, expansion * width)
            inputs = expansion * width
    return total + inputs * classes + classes


@pytest.mark.parametrize("name", SIZES)
def test_the_published_number_of_parameters(name, count):
    sizes, expansion, published = SIZES[name]
    network = models.create(name, num_classes=1000)
    expected = analytic_parameters(sizes, expansion, 1000)
    assert count(network, (224, 224, 3)) == expected == published


@pytest.mark.parametrize("stem, first", [("imagenet", 112), ("cifar", 224)])
def test_taps_of_both_stems(stem, first, abstract):
    network = models.create("resnet50", num_classes=10, stem=stem)
    _, outputs = abstract(network, (224, 224, 3))
    stage1 = first // 2 if stem == "imagenet" else first
    widths = (256, 512, 1024, 2048)
    assert [(name, tap.shape[1:]) for name, tap in outputs.taps.items()] == [
        ("stem", (first, first, 64)),
        *(
            (f"stage{i + 1}{pre}", (stage1 // 2**i, stage1 // 2**i, width))
            for i, width in enumerate(widths)
            for pre in ("_pre", "")
        ),
        ("pooled", (2048,)),
    ]
    assert outputs.logits.shape == (1, 10)


def test_forward_equals_numpy(slow, randomised, quick_jit):
    network = models.create("resnet18", num_classes=5, width_factor=1 / 16)
    v = randomised(network, (38, 33, 3))  # odd sizes: strides round up
    image = np.random.default_rng(1).normal(size=(2, 38, 33, 3)).astype(np.float32)
    x = slow.conv(v, "trunk/stem", image, 2)
    maps = [slow.relu(slow.norm(v, "trunk/stem_norm", x))]
    x = slow.pool(maps[0], 3, padding=1)
    for stage in (1, 2, 3, 4):
        for block in (1, 2):
            stride = 2 if stage > 1 and block == 1 else 1
            x = slow.basic_block(v, f"trunk/stage{stage}_block{block}", x, stride)
        maps.append(x)
    pooled = x.mean((1, 2))
    logits = pooled @ np.array(v["params"]["head"]["kernel"])
    logits += np.array(v["params"]["head"]["bias"])

    outputs = quick_jit(network.apply)(v, jnp.array(image))
    names = ("stem", "stage1", "stage2", "stage3", "stage4", "pooled")
    for name, value in zip(names, (*maps, pooled), strict=True):
        np.testing.assert_allclose(outputs.taps[name], value, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(outputs.logits, logits, rtol=2e-4, atol=2e-4)


def test_an_unknown_stem_is_refused():
    with pytest.raises(TypeError, match="option 'stem' must be one of 'imagenet'"):
        models.create("resnet18", num_classes=10, stem="tiny")


def test_the_trunk_is_shared_with_the_segmentation_student(abstract):
    options = {"num_classes": 2, "width_factor": 0.25}
    classifier, _ = abstract(models.create("resnet18", **options), (32, 32, 3))
    student, _ = abstract(models.create("resnet18_seg", **options), (32, 32, 3))
    for collection in ("params", "batch_stats"):
        one, two = classifier[collection]["trunk"], student[collection]["trunk"]
        assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, two)


@pytest.mark.parametrize("name, norm", [("resnet18", "norm2"), ("resnet50", "norm3")])
def test_pre_taps_norms_and_head_are_those_of_the_forward_pass(
    name, norm, randomised, quick_jit
):
    network = models.create(name, num_classes=5, width_factor=1 / 32)
    v = randomised(network, (32, 32, 3))
    images = jnp.array(np.random.default_rng(1).normal(size=(2, 32, 32, 3)), "float32")
    outputs = quick_jit(network.apply)(v, images)
    sizes = SIZES[name][0]
    pre_taps = [f"stage{i}_pre" for i in (1, 2, 3, 4)]
    assert list(outputs.norms) == pre_taps
    assert min(outputs.taps[tap].min() for tap in pre_taps) < 0
    for stage, size in enumerate(sizes, start=1):
        pre = outputs.taps[f"stage{stage}_pre"]
        np.testing.assert_array_equal(np.maximum(pre, 0), outputs.taps[f"stage{stage}"])
        block = v["params"]["trunk"][f"stage{stage}_block{size}"]
        jax.tree.map(
            np.testing.assert_array_equal,
            outputs.norms[f"stage{stage}_pre"],
            block[norm],
        )
    assert outputs.head.keys() == {"kernel", "bias"}
    logits = outputs.taps["pooled"] @ outputs.head["kernel"]
    logits += outputs.head["bias"].reshape(1, -1)
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-5, atol=1e-5)


def test_a_gradient_reaches_the_parameters_behind_head_and_norms(randomised, quick_jit):
    network = models.create("resnet14", num_classes=5, width_factor=1 / 16)
    v = randomised(network, (8, 8, 3))
    images = jnp.ones((1, 8, 8, 3))

    def loss(params):
        outputs = network.apply({**v, "params": params}, images)
        norm = outputs.norms["stage2_pre"]["scale"]
        return jnp.sum(outputs.head["bias"]) + 2 * jnp.sum(norm)

    gradient = quick_jit(jax.grad(loss))(v["params"])
    np.testing.assert_array_equal(gradient["head"]["bias"], 1)
    norms = gradient["trunk"]["stage2_block2"]
    np.testing.assert_array_equal(norms["norm2"]["scale"], 2)
    np.testing.assert_array_equal(norms["norm1"]["scale"], 0)
