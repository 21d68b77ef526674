"""What networks consist of: operations by hand and against published figures."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxkd import models
from jaxkd.layers import BatchNorm, Outputs, max_pool
from jaxkd.layers.convolution import Conv
from jaxkd.layers.dense import Dense
from jaxkd.sparsity.structure import Call, Flops, network_structure, read_structure


class Small(nn.Module):
    """One layer of each kind, with numbers that tell them apart."""

    twice: bool = False

    @nn.compact
    def __call__(self, images, *, train=False):
        x = Conv(6, (3, 3), padding=1, use_bias=False, name="first")(images)
        x = nn.relu(BatchNorm(name="norm")(x, train))
        x = max_pool(x, window=2, stride=2)
        grouped = Conv(4, (1, 1), feature_group_count=2, name="grouped")
        x = grouped(x)
        y = BatchNorm(name="late")(x + 1, train)
        if self.twice:
            y = grouped(jnp.concatenate([y, y[..., :2]], axis=-1))
        x = y.mean((1, 2))
        return Outputs(logits=Dense(3, name="head")(x), taps={"pooled": x})


def test_calls_are_written_down_in_their_order():
    found = network_structure(Small(), (8, 6, 3))
    kinds = [(call.path, call.kind) for call in found.calls]
    assert [kind for _, kind in kinds] == [
        "conv", "norm", "max_pool", "conv", "norm", "dense",
    ]  # fmt: skip
    first, grouped = found.call("first"), found.call("grouped")
    assert (first.inputs, first.outputs) == ((1, 8, 6, 3), (1, 8, 6, 6))
    assert (first.taps, first.bias, first.weights) == (9, False, 9 * 3 * 6)
    assert (grouped.groups, grouped.bias, grouped.weights) == (2, True, 3 * 4)
    # Only a norm of the very output counts as the norm of a layer.
    assert first.norm == "norm" and grouped.norm is None
    assert found.logits == (1, 3) and found.taps == {"pooled": (1, 4)}
    assert found.params["grouped/kernel"] == (1, 1, 3, 4)
    assert found.call("nowhere") is None


def test_operations_by_hand():
    found = network_structure(Small(), (8, 6, 3))
    conv = Flops(adds=(162 - 1) * 48, multiplies=162 * 48)
    grouped = Flops(adds=(12 - 1) * 12 + 4 * 12, multiplies=12 * 12)
    norm = Flops(adds=2 * 6 * 47 + 2 * 288, multiplies=3 * 288, other=6)
    late = Flops(adds=2 * 4 * 11 + 2 * 48, multiplies=3 * 48, other=4)
    head = Flops(adds=3 * 3 + 3, multiplies=12)
    pool = Flops(other=3 * 12 * 6)
    total = conv + grouped + norm + late + head + pool
    assert found.flops() == total
    assert found.flops(kinds=("norm",)) == norm + late
    # 12 numbers of each of 4 channels are added up and divided.
    averaged = found.flops(average_pool=True)
    assert averaged == total + Flops(adds=11 * 4, other=4)


def test_densities_scale_products_and_round_down():
    found = network_structure(Small(), (8, 6, 3))
    dense, density = found.flops(kinds=("conv",)), 0.3
    sparse = found.flops({"first/kernel": density}, kinds=("conv",))
    adds, multiplies = (162 - 1) * 48, 162 * 48
    assert dense.adds - sparse.adds == adds - int(adds * density)
    assert dense.multiplies - sparse.multiplies == multiplies - int(
        multiplies * density
    )
    assert found.kernel_flops("first/kernel") == adds + multiplies
    # A bias is added whatever the kernel.
    none = found.flops({"grouped/kernel": 0.0}, kinds=("conv",))
    assert dense.total - none.total == found.kernel_flops("grouped/kernel")
    with pytest.raises(KeyError, match="no kernel"):
        found.kernel_flops("nowhere/kernel")


def test_layers_side_by_side_are_counted_each():
    options = dict(path="a", kind="conv", inputs=(1, 4, 4, 2), taps=9)
    one = Call(outputs=(1, 4, 4, 5), **options)
    two = Call(outputs=(1, 4, 4, 10), parts=2, **options)
    found = network_structure(Small(), (8, 6, 3))
    counted = [
        found.__class__(
            calls=(call,), blocks={}, params={}, logits=(), taps={}, operations={}
        ).flops({"a/kernel": 0.3})
        for call in (one, two)
    ]
    assert counted[1] == counted[0] + counted[0]


def test_depthwise_layers_are_known():
    network = models.create("mobilenetv2_cifar", num_classes=10, width_factor=0.5)
    found = network_structure(network, (32, 32, 3))
    depthwise = [call.path for call in found.calls if call.depthwise]
    assert len(depthwise) == 17 and all("depthwise" in path for path in depthwise)


@pytest.mark.parametrize(
    ("name", "options", "size", "flops", "params"),
    [
        ("resnet18", {"stem": "cifar", "num_classes": 100}, 32, 1115226800, 11220132),
        ("resnet18", {"num_classes": 1000}, 224, 3647128359, 11689512),
        ("resnet34", {"num_classes": 1000}, 224, 7355270501, 21797672),
    ],
)
def test_published_figures(name, options, size, flops, params):
    network = models.create(name, **options)
    found = network_structure(network, (size, size, 3))
    # In the networks for ImageNet the last average is a module, which counts.
    assert found.flops(average_pool=size == 224).total == flops
    assert sum(map(math.prod, found.params.values())) == params


def test_recomputed_blocks_consist_of_the_same():
    plain, again = (
        network_structure(
            models.create("resnet8", num_classes=4, width_factor=0.25, remat=remat),
            (8, 8, 3),
        )
        for remat in ("none", "blocks")
    )
    assert plain.calls == again.calls and plain.blocks == again.blocks


def test_batches_do_not_matter_and_nothing_is_computed():
    images = jax.ShapeDtypeStruct((64, 8, 6, 3), jnp.float32)
    assert read_structure(Small(), images) == network_structure(Small(), (8, 6, 3))


def test_attention_is_known_by_its_heads():
    network = models.create(
        "deit_tiny", num_classes=4, width_factor=0.25, patch_size=4, depth=4
    )
    found = network_structure(network, (8, 8, 3))
    assert found.call("block1/attention/qkv").heads == 3
    assert network_structure(Small(), (8, 6, 3)).call("head").heads == 1


def test_a_layer_that_is_called_twice_is_named():
    with pytest.raises(ValueError, match="layer 'grouped' is called twice"):
        network_structure(Small(twice=True), (8, 6, 3))
