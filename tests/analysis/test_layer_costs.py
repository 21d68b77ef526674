"""Costs by layer against counts by hand, and against the totals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models
from jaxkd.analysis.costs import network_costs
from jaxkd.analysis.layer_costs import (
    layer_costs,
    layer_of,
    mask_densities,
    xla_flops,
)


class Two(nn.Module):
    """A convolution, its activation, and a dense layer in a child."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), use_bias=False, name="conv")(x))
        return Head(name="head")(x.mean((1, 2)))


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        return 2 * nn.Dense(5, name="dense")(x)


@pytest.fixture(scope="module")
def two():
    images = jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.float32)
    variables = jax.eval_shape(Two().init, jax.random.key(0), images)
    return variables, images


def by_path(costs):
    return {layer.path: layer for layer in costs.layers}


def test_layers_by_hand(two):
    layers = by_path(layer_costs(Two().apply, *two))
    conv, head, dense = (layers[p] for p in ("conv", "head", "head/dense"))
    assert conv.params == 3 * 3 * 3 * 8 and conv.macs == 6 * 6 * conv.params
    assert dense.params == 8 * 5 + 5 and dense.macs == 8 * 5
    assert head.params == head.macs == 0
    # What a layer hands on, float32: a map, a row of five, another one.
    assert conv.activation_bytes == 6 * 6 * 8 * 4
    assert dense.activation_bytes == head.activation_bytes == 5 * 4
    assert conv.bytes == conv.params * 4 and conv.density == 1


def test_peaks_are_of_what_lives_at_once(two):
    layers = by_path(layer_costs(Two().apply, *two))
    one_map = 6 * 6 * 8 * 4
    # The input is not counted, ReLU takes the place of the map.
    assert layers["conv"].peak_bytes == one_map
    assert layers[""].peak_bytes <= one_map + 3 * 8 * 4

    def both(variables, x):
        y = Two().apply(variables, x)
        big = jnp.broadcast_to(jnp.sum(y), (100, 100))
        return jnp.sum(big * 2 + 1) + jnp.sum(y)

    peak = layer_costs(both, *two).total("peak_bytes")
    assert 100 * 100 * 4 <= peak < 2 * 100 * 100 * 4


def test_masks_and_widths_count(two):
    costs = layer_costs(
        Two().apply,
        *two,
        densities={"conv/kernel": 0.25, "head/dense/kernel": 0.5},
        weight_bits={"conv": 4},
        activation_bits=8,
    )
    layers = by_path(costs)
    conv, dense = layers["conv"], layers["head/dense"]
    assert conv.effective_macs == conv.macs / 4
    assert conv.bytes == conv.params / 4 * 4 / 8
    assert conv.bops == conv.macs / 4 * 4 * 8
    assert dense.density == pytest.approx((20 + 5) / 45)  # the bias is dense
    assert dense.weight_bits == 32 and dense.activation_bits == 8
    kept = conv.params / 4 + 25
    assert costs.density == pytest.approx(kept / costs.total("params"))
    with pytest.raises(ValueError, match="'conv/weight', which is no parameter"):
        layer_costs(Two().apply, *two, densities={"conv/weight": 0.5})


@pytest.mark.parametrize("remat", ["none", "blocks"])
@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2_cifar", "deit_tiny", "unet"])
def test_layers_add_up_to_the_network(name, remat):
    options = {"image_size": 32, "patch_size": 8} if name == "deit_tiny" else {}
    try:
        module = models.create(name, num_classes=5, remat=remat, **options)
    except TypeError:
        module = models.create(name, num_classes=5, remat=remat)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    costs = layer_costs(lambda v, x: module.apply(v, x).logits, variables, images)
    whole = network_costs(module, (32, 32, 3))
    assert costs.total("params") == whole.params
    assert costs.total("macs") == whole.macs
    # Every layer with parameters is one that computes.
    for layer in costs.layers:
        if layer.params and "token" not in layer.path and layer.path:
            assert layer.activation_bytes or layer.macs, layer.path


def test_xla_counts_at_least_the_products(two):
    variables, images = two
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables)
    flops = xla_flops(Two().apply, zeros, jnp.zeros(images.shape))
    macs = layer_costs(Two().apply, *two).total("macs")
    # Padding is counted here and not there; pooling and ReLU there and not here.
    assert flops is not None and 0.6 < 2 * macs / flops < 1.4


@pytest.mark.parametrize(
    ("stack", "path"),
    [
        ("ResNet/trunk/trunk._stem/stem/stem", "trunk/stem"),
        ("ResNet", ""),
        ("", ""),
        ("Two/head/dense", "head/dense"),
    ],
)
def test_paths_of_layers(stack, path):
    assert layer_of(stack) == path


def test_densities_of_masks():
    masks = {
        "conv": {"kernel": np.array([True, False]), "bias": jnp.ones((), bool)},
        "head": {"kernel": jnp.ones((2, 2), bool)},
    }
    assert mask_densities(masks) == {"conv/kernel": 0.5, "head/kernel": 1.0}
