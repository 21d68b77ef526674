"""What holds for every network: options, dtypes, taps, gradients, remat, errors."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models
from jaxkd.layers import NetworkSpec, Outputs
from jaxkd.models._options import check_images

SEGMENTATION = ["resnet18_seg", "unet", "unetpp"]
CIFAR = [
    *("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56"),
    *("resnet110", "resnet8x4", "resnet32x4", "wrn_16_1", "wrn_16_2", "wrn_16_4"),
    *("wrn_28_2", "wrn_28_4", "wrn_28_10", "wrn_40_1", "wrn_40_2", "wrn_40_4"),
    *("plain20", "plain32", "plain44", "plain56", "plain110"),
]
IMAGENET = [
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("plain18", "plain34", "plain50"),
]
SMALL = [
    *("vgg8", "vgg11", "vgg13", "vgg16", "vgg19"),
    *("vgg11_imagenet", "vgg13_imagenet", "vgg16_imagenet", "vgg19_imagenet"),
    *("mobilenetv2", "mobilenetv2_cifar", "shufflenetv1"),
    *("shufflenetv2_x0_5", "shufflenetv2_x1_0"),
    *("shufflenetv2_x1_5", "shufflenetv2_x2_0"),
]
TRANSFORMERS = [
    *("deit_tiny", "deit_small", "deit_base"),
    *("deit_tiny_distilled", "deit_small_distilled", "deit_base_distilled"),
]
BOTTLENECK = ["bottlefit", "bottlefit_seg"]
# One of each family, for tests that compile.
FAMILIES = ["unet", "unetpp", "resnet18_seg", "resnet8", "wrn_16_2", "resnet18", "vgg8"]
# And those whose depth takes long to compile; see also test_units.py.
ALL_FAMILIES = [*FAMILIES, "mobilenetv2", "shufflenetv1", "shufflenetv2_x0_5"]


def narrow(name, **options):
    return models.create(name, num_classes=3, width_factor=1 / 16, **options)


def image_shape(name):
    return (16, 16, 1) if name in SEGMENTATION else (8, 8, 3)


def images(name, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, *image_shape(name))
    return jnp.array(rng.normal(size=shape), jnp.float32)


def loss_and_gradient(network):
    def loss(params, batch_stats, x):
        v = {"params": params, "batch_stats": batch_stats}
        outputs, new = network.apply(v, x, train=True, mutable=["batch_stats"])
        taps = sum(jnp.mean(jnp.square(tap)) for tap in outputs.taps.values())
        return jnp.mean(jnp.square(outputs.logits)) + 0.1 * taps, new

    return jax.value_and_grad(loss, has_aux=True)


def test_all_promised_names_are_there():
    assert models.names() == sorted(
        SEGMENTATION + CIFAR + IMAGENET + SMALL + TRANSFORMERS + BOTTLENECK
    )


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_every_network_returns_outputs_and_two_collections(name, abstract):
    network = narrow(name)
    variables, outputs = abstract(network, image_shape(name), batch=2)
    assert isinstance(network, nn.Module) and isinstance(outputs, Outputs)
    assert variables.keys() == {"params", "batch_stats"}
    size = image_shape(name)[:2] if name in SEGMENTATION else ()
    assert outputs.logits.shape == (2, *size, 3)
    assert outputs.logits.dtype == jnp.float32
    spec = NetworkSpec.from_outputs(name, outputs)
    first, last = ("e1", "out") if name in SEGMENTATION else ("stem", "pooled")
    assert (next(iter(spec.taps)), next(reversed(spec.taps))) == (first, last)
    assert spec.num_classes == 3


def test_taps_keep_their_depth_order_through_jit(randomised, quick_jit):
    network = narrow("resnet18_seg")
    v = randomised(network, (16, 16, 1))
    outputs = quick_jit(network.apply)(v, images("resnet18_seg"))
    assert list(outputs.taps) == "e1 e2 e3 e4 e5 d5 d4 d3 d2 out".split()


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_bfloat16_computes_narrow_and_keeps_parameters_and_logits_wide(name, abstract):
    variables, outputs = abstract(narrow(name, dtype="bfloat16"), image_shape(name))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert outputs.logits.dtype == jnp.float32
    wide = {name for name, tap in outputs.taps.items() if tap.dtype == jnp.float32}
    assert wide <= {"out", "pooled"}


@pytest.mark.parametrize("name", ["resnet18_seg", "wrn_16_2"])
def test_bfloat16_is_close_to_float32(name, randomised, quick_jit):
    v = randomised(narrow(name), image_shape(name))
    x = images(name)
    exact = quick_jit(narrow(name).apply)(v, x).logits
    half = quick_jit(narrow(name, dtype="bfloat16").apply)(v, x).logits
    scale = float(jnp.abs(exact).max())
    np.testing.assert_allclose(half, exact, atol=0.05 * scale)
    assert not np.array_equal(half, exact)


@pytest.mark.parametrize("name", FAMILIES)
def test_remat_recomputes_blocks_and_keeps_the_parameter_tree(name, abstract):
    plain, remat = narrow(name), narrow(name, remat=True)
    v, _ = abstract(plain, image_shape(name))
    kept, _ = abstract(remat, image_shape(name))
    assert jax.tree.map(jnp.shape, v) == jax.tree.map(jnp.shape, kept)
    args = (v["params"], v["batch_stats"], images(name))
    assert "remat" in str(jax.make_jaxpr(loss_and_gradient(remat))(*args))
    assert "remat" not in str(jax.make_jaxpr(loss_and_gradient(plain))(*args))


@pytest.mark.parametrize("name", ["resnet8"])
def test_remat_changes_no_number(name, randomised, quick_jit):
    v, x = randomised(narrow(name), image_shape(name)), images(name)
    args = (v["params"], v["batch_stats"], x)
    one = quick_jit(loss_and_gradient(narrow(name)))(*args)
    two = quick_jit(loss_and_gradient(narrow(name, remat=True)))(*args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, two
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_learns_and_every_statistic_moves(name, randomised, quick_jit):
    network, x = narrow(name), images(name, batch=4)
    v = randomised(network, image_shape(name))
    step = quick_jit(loss_and_gradient(network))
    (value, new), gradient = step(v["params"], v["batch_stats"], x)
    assert np.isfinite(value)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        # A bias before a batch norm has no effect; every other parameter has.
        if path[-1].key != "bias" or "norm" in str(path):
            assert np.abs(leaf).max() > 0, path
    moved = jax.tree.map(
        lambda old, new: not np.array_equal(old, new),
        v["batch_stats"],
        new["batch_stats"],
    )
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", ["unet", "resnet8", "resnet50", "vgg8"])
def test_the_width_factor_scales_every_map(name, abstract):
    shape = image_shape(name)
    _, full = abstract(models.create(name, num_classes=3), shape)
    for factor in (0.3, 2.0):
        network = models.create(name, num_classes=3, width_factor=factor)
        _, scaled = abstract(network, shape)
        for tap, value in full.taps.items():
            expected = value.shape[-1] * factor if tap != "out" else 3
            assert abs(scaled.taps[tap].shape[-1] - expected) <= 4 * 0.5


def test_a_tiny_width_factor_leaves_one_channel(abstract):
    variables, outputs = abstract(
        models.create("resnet8", num_classes=2, width_factor=0.001), (8, 8, 3)
    )
    assert outputs.taps["stage3"].shape[-1] == 1
    assert all(math.prod(x.shape) for x in jax.tree.leaves(variables))


def test_any_number_of_input_channels(abstract):
    for name in ("unet", "resnet18_seg", "resnet8", "wrn_16_2"):
        for channels in (2, 4):
            _, outputs = abstract(narrow(name), (16, 16, channels))
            assert outputs.logits.shape[-1] == 3


@pytest.mark.parametrize(
    "name, options, error, message",
    [
        ("resnet21", {}, KeyError, "no network 'resnet21'; did you mean 'resnet"),
        ("unet", {"widthfactor": 1.0}, TypeError, "did you mean 'width_factor'"),
        ("unet", {"width_factor": 0.0}, ValueError, "width_factor must be > 0, got 0"),
        ("resnet8", {"num_classes": 0}, ValueError, "num_classes must be >= 1, got 0"),
        ("resnet8", {"dtype": "int8"}, ValueError, "dtype must be a floating-point"),
        ("resnet8", {"dtype": "half-ish"}, ValueError, "got 'half-ish'"),
        ("resnet8", {"remat": "yes"}, TypeError, "option 'remat' must be"),
    ],
)
def test_mistakes_name_the_option_and_a_remedy(name, options, error, message):
    with pytest.raises(error, match=message):
        models.create(name, **{"num_classes": 2, **options})


def test_unbatched_images_are_refused():
    with pytest.raises(ValueError, match=r"resnet needs images \[batch, height, wid"):
        check_images(jnp.zeros((8, 8, 3)), network="resnet")
