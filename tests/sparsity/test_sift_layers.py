"""Replaced layers against the sums and products that define them."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models
from jaxkd.layers import BatchNorm, Outputs
from jaxkd.layers.convolution import Conv
from jaxkd.layers.dense import Dense
from jaxkd.sparsity import sift_layers
from jaxkd.sparsity.sift_layers import Sift, apply_plan, base_width, folded, replacing
from jaxkd.sparsity.structure import network_structure, read_structure

IMAGES = jax.random.normal(jax.random.key(0), (3, 7, 6, 4))


class Unit(nn.Module):
    """A convolution and, if asked for, the batch norm of its output."""

    groups: int = 1
    stride: int = 2
    norm: bool = True
    bias: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = Conv(
            8, (3, 3), strides=self.stride, padding=1, use_bias=self.bias,
            feature_group_count=self.groups, name="conv",
        )(x)  # fmt: skip
        return BatchNorm(name="norm")(x, train) if self.norm else x


class Product(nn.Module):
    """A product without a norm."""

    @nn.compact
    def __call__(self, x, train):
        return Dense(6, name="dense", bias_init=nn.initializers.normal(1.0))(x)


def planned(module, family, paths=("conv",), **options):
    structure = read_structure(module, IMAGES, False)
    replaced = {path: structure.call(path) for path in paths}
    options = {"sparsity": 0.5, "base_width": 4, **options}
    return Sift(family=family, dense=structure, replaced=replaced, **options)


@contextlib.contextmanager
def acting(sift, *, train=False):
    with replacing(lambda *_: sift, train=train):
        yield


def initial(sift, module, seed=0):
    with acting(sift):
        variables = module.init(jax.random.key(seed), IMAGES, False)
    # Norms that do something.
    keys = iter(jax.random.split(jax.random.key(seed + 1), 20))
    return jax.tree.map(
        lambda x: x if x.ndim > 1 else jax.random.uniform(next(keys), x.shape, x.dtype),
        variables,
    )


def run(sift, module, variables, train=False):
    with acting(sift, train=train):
        y, new = module.apply(variables, IMAGES, train, mutable=["batch_stats"])
    return y, new


def convolve(x, kernel, stride=1, padding=1, groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip


def normalised(x, scale, bias):
    mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
    mean, var, scale, bias = (v[None, None, None] for v in (mean, var, scale, bias))
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias


def branch(values, number, count, groups):
    """The part of one branch: branches lie side by side within every group."""
    parts = values.reshape(*values.shape[:-1], groups, count, -1)
    return parts[..., number, :].reshape(*values.shape[:-1], -1)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_parallel_branches_have_a_norm_each(groups, relu):
    module = Unit(groups=groups, stride=2)
    sift = planned(module, "parallel", sparsity=2 / 3, branch_relu=relu)
    assert sift.branches == 3
    variables = initial(sift, module)
    params = variables["params"]
    assert params["conv"]["kernel"].shape == (3, 3, 4 // groups, 24)
    assert params["norm"]["scale"].shape == (24,)
    y, new = run(sift, module, variables, train=True)
    total, means = 0.0, []
    for i in range(3):
        norm = params["norm"]
        kernel, scale, bias = (
            branch(x, i, 3, groups)
            for x in (params["conv"]["kernel"], norm["scale"], norm["bias"])
        )
        out = convolve(IMAGES, kernel, stride=2, groups=groups)
        means.append(jnp.mean(out, (0, 1, 2)))
        out = normalised(out, scale, bias)
        total = total + (nn.relu(out) if relu else out)
    np.testing.assert_allclose(y, total, rtol=1e-4, atol=1e-5)
    old = variables["batch_stats"]["norm"]["mean"]
    moved = new["batch_stats"]["norm"]["mean"]
    for i, mean in enumerate(means):
        np.testing.assert_allclose(
            branch(moved, i, 3, groups), 0.9 * branch(old, i, 3, groups) + 0.1 * mean,
            atol=1e-5,
        )  # fmt: skip


def test_parallel_layers_without_a_norm_are_summed_and_keep_their_biases():
    module = Product()
    sift = planned(module, "parallel", ("dense",))
    variables = initial(sift, module)
    kernel, bias = (variables["params"]["dense"][k] for k in ("kernel", "bias"))
    assert kernel.shape == (4, 12) and bias.shape == (12,)
    y, _ = run(sift, module, variables)
    expected = IMAGES @ (kernel[:, :6] + kernel[:, 6:])
    expected = expected + (bias[:6] + bias[6:])[None, None, None]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_branches_are_drawn_as_one_layer_each(groups):
    module = Unit(groups=groups)

    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
            return Conv(64, (3, 3), kernel_init=init, name="conv",
                        feature_group_count=groups)(x)  # fmt: skip

    module = Wide()
    sift = planned(module, "parallel", sparsity=0.75)
    kernel = initial(sift, module)["params"]["conv"]["kernel"]
    spread = [float(jnp.std(branch(kernel, i, 4, groups))) for i in range(4)]
    # Kaiming by the fan-out of one branch, not rescaled for zeros.
    np.testing.assert_allclose(spread, np.sqrt(2 / (9 * 64)), rtol=0.06)
    assert not np.allclose(branch(kernel, 0, 4, groups), branch(kernel, 1, 4, groups))


@pytest.mark.parametrize("uv_layer", ["linear", "nonlinear_norelu", "nonlinear_relu"])
@pytest.mark.parametrize("norm", [True, False])
def test_factorized_layers(uv_layer, norm):
    module = Unit(norm=norm, bias=True)
    sift = planned(module, "factorized", uv_layer=uv_layer)
    rank = sift.rank(sift.replaced["conv"])
    assert rank == -(-9 * 4 * 8 // (0.5 * (9 * 4 + 8)))
    variables = initial(sift, module)
    params = variables["params"]["conv"]
    assert params["U"]["kernel"].shape == (3, 3, 4, rank)
    assert params["V"]["kernel"].shape == (1, 1, rank, 8)
    # The bias is that of the second; the layer's own kernel is gone.
    assert params["V"]["bias"].shape == (8,) and "kernel" not in params
    # Without a norm after the layer there is none between the factors.
    assert ("norm" in params) == (norm and uv_layer != "linear")
    y, new = run(sift, module, variables, train=True)
    h = convolve(IMAGES, params["U"]["kernel"], stride=2)
    if "norm" in params:
        h = normalised(h, params["norm"]["scale"], params["norm"]["bias"])
        old = variables["batch_stats"]["conv"]["norm"]["mean"]
        assert (new["batch_stats"]["conv"]["norm"]["mean"] != old).all()
    if uv_layer == "nonlinear_relu":
        h = nn.relu(h)
    h = convolve(h, params["V"]["kernel"], padding=0)
    h = h + params["V"]["bias"][None, None, None]
    if norm:
        h = normalised(h, *(variables["params"]["norm"][k] for k in ("scale", "bias")))
    np.testing.assert_allclose(y, h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_doped_layers_are_one_layer_when_folded(groups):
    module = Unit(norm=False, groups=groups, bias=True)
    sift = planned(module, "doped", sparsity=0.75)
    variables = initial(sift, module)
    params = variables["params"]["conv"]
    first, second = params["U"]["kernel"], params["V"]["kernel"]
    rank = sift.rank(sift.replaced["conv"])
    assert rank % groups == 0 and first.shape[-1] == rank
    assert "bias" not in params["V"] and params["bias"].shape == (8,)
    y, _ = run(sift, module, variables)
    kernel = folded(first, second, params["kernel"])
    expected = convolve(IMAGES, kernel, stride=2, groups=groups)
    expected = expected + params["bias"][None, None, None]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_folded_products():
    first = jax.random.normal(jax.random.key(0), (5, 3))
    second = jax.random.normal(jax.random.key(1), (3, 4))
    np.testing.assert_allclose(folded(first, second), first @ second, rtol=1e-5)


def test_a_doped_layer_of_rank_zero_is_the_layer():
    module = Unit(norm=False)
    sift = planned(module, "doped", sparsity=0.01)
    assert sift.rank(sift.replaced["conv"]) == 0
    variables = initial(sift, module)
    assert set(variables["params"]["conv"]) == {"kernel"}
    y, _ = run(sift, module, variables)
    expected = module.apply(variables, IMAGES, False)
    np.testing.assert_array_equal(y, expected)


def test_ranks_of_a_choice():
    module = Unit(norm=False, groups=2)
    sift = planned(module, "doped", ranks={"conv": 4})
    assert initial(sift, module)["params"]["conv"]["U"]["kernel"].shape[-1] == 4
    with pytest.raises(ValueError, match="has 2 groups, which do not divide"):
        planned(module, "doped", ranks={"conv": 3}).rank(sift.replaced["conv"])


def test_other_layers_stay_and_nothing_stays_behind():
    module = Unit(stride=1)
    sift = planned(module, "parallel", paths=())
    variables = module.init(jax.random.key(0), IMAGES, False)
    y, _ = run(sift, module, variables)
    np.testing.assert_array_equal(y, module.apply(variables, IMAGES, False))
    chosen = planned(module, "parallel")
    with acting(chosen):
        assert module.init(jax.random.key(0), IMAGES, False)["params"]["conv"][
            "kernel"
        ].shape == (3, 3, 4, 16)
    again = module.init(jax.random.key(0), IMAGES, False)["params"]["conv"]["kernel"]
    np.testing.assert_array_equal(again, variables["params"]["conv"]["kernel"])


# The wide family, on networks.


def wide(network, shape, **options):
    dense = network_structure(network, shape)
    options = {"sparsity": 0.5, "base_width": base_width(dense), **options}
    sift = Sift(family="wide", dense=dense, replaced={}, **options)
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return sift, apply_plan(sift, network, images, train=False)


def test_a_wide_resnet_has_the_published_widths():
    network = models.create("resnet18", num_classes=100, stem="cifar")
    sift, found = wide(network, (32, 32, 3))
    assert sift.base_width == 64
    widths = [found.params[f"trunk/stage{i}_block2/conv2/kernel"][2:] for i in (1, 4)]
    assert widths == [(90, 90), (720, 720)]
    assert found.params["trunk/stem/kernel"] == (3, 3, 3, 90)
    assert found.params["head/kernel"] == (720, 100)
    # Shortcuts that were the identity stay so.
    assert found.params.keys() == sift.dense.params.keys()


def test_wide_bottlenecks_keep_their_ratio():
    network = models.create("resnet50", num_classes=5, width_factor=0.25)
    _, found = wide(network, (32, 32, 3))
    assert found.params["trunk/stage1_block1/conv3/kernel"] == (1, 1, 22, 88)


def test_wide_depthwise_layers_follow_their_input():
    network = models.create("mobilenetv2_cifar", num_classes=5)
    _, found = wide(network, (32, 32, 3), sparsity=0.75)
    for call in found.calls:
        if "depthwise/conv" in call.path:
            assert call.groups == call.f_in == call.f_out
    assert found.call("group2_block1/depthwise/conv").f_in == 96  # 6 x 8 x 2
    assert found.call("last/conv").f_out == 2560


def test_wide_attention_keeps_its_heads():
    network = models.create(
        "deit_tiny", num_classes=5, width_factor=0.25, patch_size=4, depth=4
    )
    sift, found = wide(network, (8, 8, 3))
    assert sift.base_width == 16
    assert found.params["block4/attention/qkv/kernel"] == (66, 198)
    assert found.params["block4/hidden/kernel"] == (66, 264)
    assert found.params["cls_token"] == (1, 1, 66) and found.logits == (1, 5)


def test_skips_that_a_width_decides_stay_as_they_were():
    network = models.create(
        "resnet8", num_classes=5, width_factor=0.5, skip="downsample_only"
    )
    _, found = wide(network, (8, 8, 3))
    assert not any("stage1_block1/shortcut" in path for path in found.params)
    assert any("stage2_block1/shortcut" in path for path in found.params)


@pytest.mark.parametrize(
    ("name", "place"), [("mobilenetv2_cifar", ""), ("resnet8", " at 'trunk/.*shortcut")]
)
def test_a_network_that_would_compute_something_else_is_refused(
    monkeypatch, name, place
):
    """Without their own widths, blocks lose or gain a shortcut."""
    monkeypatch.setattr(sift_layers, "_resize", lambda *_: None)
    network = models.create(name, num_classes=5, width_factor=0.5)
    with pytest.raises(ValueError, match=f"(something else{place})|(is not in the)"):
        wide(network, (16, 16, 3))


def test_groups_that_do_not_divide_a_width_are_named():
    network = models.create("shufflenetv1", num_classes=5)
    with pytest.raises(ValueError, match=r"layer '.*' would have .* 3 groups"):
        wide(network, (32, 32, 3))


class Peeking(nn.Module):
    """Hands out what its batch norm reads."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = Conv(4, (3, 3), name="conv")(images)
        y = BatchNorm(name="norm")(x, train).mean((1, 2))
        return Outputs(logits=Dense(3, name="head")(y), taps={"raw": x, "pooled": y})


def test_an_output_that_others_read_too_is_refused():
    dense = network_structure(Peeking(), (6, 6, 3))
    replaced = {"conv": dense.call("conv")}
    images = jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.float32)
    for family in ("factorized", "doped"):
        sift = Sift(family=family, sparsity=0.5, dense=dense, replaced=replaced)
        apply_plan(sift, Peeking(), images, train=False)
    sift = Sift(family="parallel", sparsity=0.5, dense=dense, replaced=replaced)
    with pytest.raises(ValueError, match="the shape of raw changes"):
        apply_plan(sift, Peeking(), images, train=False)
