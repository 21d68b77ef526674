"""Which channels may be taken away: found, sliced, and gone without a trace."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models
from jaxkd.layers.convolution import Conv
from jaxkd.layers.dense import Dense
from jaxkd.sparsity import shrink
from jaxkd.sparsity.channels import find_channels, sized, slice_variables

SHAPE = (8, 8, 3)


def functions(module, shape=SHAPE):
    images = jnp.zeros((1, *shape))
    return (
        lambda key: dict(module.init(key, images, train=False)),
        lambda variables, x: module.apply(variables, x, train=False).logits,
    )


def channels_of(name, shape, **options):
    module = models.create(name, num_classes=4, **options)
    return module, find_channels(*functions(module, shape), shape)


def random_variables(module, shape, seed=0):
    """Variables of which none is zero."""
    images = jnp.zeros((1, *shape))
    shapes = jax.eval_shape(lambda k: module.init(k, images), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(x):
        scale = 1.0 if len(x.shape) < 2 else np.prod(x.shape[:-1]) ** -0.5
        values = rng.uniform(0.5, 1.5, x.shape) * scale
        return jnp.asarray(values * np.where(rng.random(x.shape) < 0.4, -1, 1) ** (
            len(x.shape) > 1), x.dtype)  # fmt: skip

    return jax.tree.map(draw, dict(shapes))


def chosen(channels, seed=1):
    rng = np.random.default_rng(seed)
    keep = {p: rng.random(channels.sites[p].features) < 0.5 for p in channels.free}
    for kept in keep.values():
        kept[-1], kept[0] = True, False
    return keep


def check_exact(module, channels, shape, *, connect=False):
    """The smaller network gives the logits of the one with closed channels."""
    keep, variables = chosen(channels), random_variables(module, shape)
    _, logits = functions(module, shape)
    closed = shrink.close_channels(channels, variables, keep)
    found = shrink.open_channels(channels, closed)
    for path in channels.free:
        np.testing.assert_array_equal(found[path], keep[path])
    if connect:
        found = shrink.connected(channels, found, logits, closed, shape)
    small, stay = shrink.shrink(channels, closed, found)
    images = jax.random.normal(jax.random.key(2), (2, *shape))
    wanted = jax.jit(logits)(closed, images)
    with shrink.smaller(channels, stay):
        got = jax.jit(lambda v, x: logits(v, x))(small, images)
    scale = float(jnp.abs(wanted).max())
    np.testing.assert_allclose(got / scale, wanted / scale, atol=1e-5)
    before, after = (
        sum(x.size for x in jax.tree.leaves(v["params"])) for v in (closed, small)
    )
    assert after < before


def test_inner_channels_of_residual_blocks_are_free():
    module, channels = channels_of("resnet8", SHAPE, width_factor=0.25)
    assert channels.free == tuple(f"trunk/stage{i}_block1/conv1" for i in (1, 2, 3))
    assert channels.norm("trunk/stage2_block1/conv1") == "trunk/stage2_block1/norm1"
    check_exact(module, channels, SHAPE)
    # Multiply-accumulates for one image of the stem: pixels, taps, channels.
    assert channels.sites["trunk/stem"].macs == 8 * 8 * 9 * 3 * 4


def test_all_layers_of_a_plain_network_but_the_last_are_free():
    module, channels = channels_of("vgg8", SHAPE, width_factor=1 / 16)
    assert channels.free == channels.layers[:-1]
    check_exact(module, channels, SHAPE)


@pytest.mark.slow
def test_depthwise_convolutions_follow_their_input():
    shape = (16, 16, 3)
    module, channels = channels_of("mobilenetv2_cifar", shape, width_factor=0.25)
    free = set(channels.free)
    assert {"stem/conv", "last/conv", "group3_block2/expand/conv"} <= free
    # Its outputs are added to others'.
    assert "group3_block2/project/conv" not in free
    assert not any("depthwise" in path for path in channels.layers)
    # Half of the stem's four channels would be as many as the first block has, which
    # would make it add a shortcut.
    check_exact(module, channels, shape, connect=True)


def test_concatenated_channels_are_told_apart():
    shape = (16, 16, 1)
    module, channels = channels_of("unet", shape, width_factor=1 / 16)
    assert len(channels.free) == len(channels.layers) - 1
    site = channels.sites["decoder2/unit1/conv"]
    assert [channels.layers[i] for i in dict.fromkeys(site.owner)] == [
        "encoder1/unit2/conv",
        "up2/conv",
    ]
    check_exact(module, channels, shape)


class Output:
    def __init__(self, logits):
        self.logits = logits


class Special(nn.Module):
    """One way of connecting layers."""

    kind: str

    @nn.compact
    def __call__(self, x, train=False):
        x = Conv(4, (3, 3), name="first")(x)
        y = nn.relu(x)
        if self.kind == "flat":
            y = y.reshape(len(y), -1)
        elif self.kind == "shuffled":
            y = y.reshape(*y.shape[:-1], 2, 2).swapaxes(-1, -2).reshape(y.shape)
        elif self.kind == "normed":
            y = nn.LayerNorm(name="tokens")(y)
        elif self.kind == "grouped":
            y = Conv(4, (3, 3), feature_group_count=2, name="grouped")(y)
        elif self.kind == "twice":
            layer = Conv(4, (3, 3), name="again")
            y = layer(layer(y))
        elif self.kind == "unseen":
            y = nn.Conv(4, (1, 1), name="unseen")(y)
        if y.ndim > 2 and self.kind != "flat":
            y = Conv(3, (1, 1), name="second")(y).mean((1, 2))
        return Output(Dense(2, name="head")(y))


@pytest.mark.parametrize(
    ("kind", "free"),
    [
        ("plain", {"first", "second"}),
        ("flat", {"first"}),
        ("normed", {"second"}),
        ("grouped", {"second"}),
        ("twice", {"second"}),
        # It can be read, but not be made smaller.
        ("unseen", {"first", "second"}),
        # A channel less would drop the sum, which the channels of one layer pass.
        ("shuffled", {"second"}),
    ],
)
def test_what_mixes_or_moves_channels(kind, free):
    module = Special(kind)
    channels = find_channels(*functions(module), SHAPE)
    assert set(channels.free) == free
    if kind == "flat":
        site = channels.sites["head"]
        np.testing.assert_array_equal(site.channel, np.arange(8 * 8 * 4) % 4)
    if kind in ("plain", "flat"):
        check_exact(module, channels, SHAPE)


def test_masks_that_do_not_fit_are_refused(channel_network):
    channels = channel_network.channels
    variables = channel_network.variables
    for keep, message in [
        ({"head": np.ones(3, bool)}, "the channels of 'head' cannot be taken away"),
        ({"first": np.ones(3, bool)}, r"must be bool \[6\] with at least"),
        ({"first": np.zeros(6, bool)}, "at least one True, got shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            shrink.shrink(channels, variables, keep)
        with pytest.raises(ValueError, match=message):
            shrink.close_channels(channels, variables, keep)


def test_a_masked_kernel_alone_is_not_closed(channel_network):
    channels, variables = channel_network.channels, channel_network.variables
    kernel = variables["params"]["first"]["kernel"].at[..., 2].set(0.0)
    first = {**variables["params"]["first"], "kernel": kernel}
    masked = {**variables, "params": {**variables["params"], "first": first}}
    assert shrink.open_channels(channels, masked)["first"].all()
    keep = {"first": np.arange(6) != 2}
    closed = shrink.close_channels(channels, masked, keep)
    np.testing.assert_array_equal(
        shrink.open_channels(channels, closed)["first"], keep["first"]
    )
    # One channel is left of a layer that is closed as a whole.
    zeros = jax.tree.map(jnp.zeros_like, variables)
    assert shrink.open_channels(channels, zeros)["first"].tolist() == [True] + 5 * [
        False
    ]


def test_sizes_and_slices_agree(channel_network):
    net = channel_network
    keep = {"first": np.arange(6) < 4}
    assert net.channels.sizes(keep) == {
        "first": (4, 1),
        "deep": (4, 4),
        "hidden": (5, 1),
        "head": (3, 1),
    }
    cut = slice_variables(net.channels, net.variables, keep)
    shapes = jax.tree.map(lambda x: x.shape, cut["params"])
    assert shapes["first"] == {"kernel": (3, 3, 3, 4), "bias": (4,)}
    assert shapes["deep"]["kernel"] == (3, 3, 1, 4)
    assert shapes["hidden"]["kernel"] == (4, 5)
    with sized(net.channels.sizes(keep), train=False):
        made = jax.eval_shape(lambda key: net.init(key), jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, made["params"]) == shapes
    stay = shrink.connected(net.channels, keep, net.logits, net.variables, net.shape)
    np.testing.assert_array_equal(stay["first"], keep["first"])


def test_a_network_without_layers_has_no_channels():
    channels = find_channels(
        lambda key: {"params": {}}, lambda v, x: x.mean((1, 2)), SHAPE
    )
    assert channels.free == () and channels.layers == ()
