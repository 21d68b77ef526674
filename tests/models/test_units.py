"""What holds for the networks built from `ConvNorm`, on shallow ones of each family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.models._units import ConvNorm, channel_shuffle
from jaxkd.models.mobilenetv2 import CIFAR, MobileNetV2
from jaxkd.models.shufflenetv1 import ShuffleNetV1
from jaxkd.models.shufflenetv2 import ShuffleNetV2
from jaxkd.models.vgg import VGG

SHALLOW = {
    "vgg": functools.partial(
        VGG, num_classes=3, stage_sizes=(1, 2, 1, 1, 1), stage_widths=(4, 4, 6, 6, 8)
    ),
    "mobilenetv2": functools.partial(
        MobileNetV2,
        num_classes=3,
        stem_width=4,
        groups=tuple(
            (min(expansion, 2), 4, 1 + (i == 1), stride)
            for i, (expansion, _, _, stride) in enumerate(CIFAR)
        ),
        last_width=6,
    ),
    "shufflenetv1": functools.partial(
        ShuffleNetV1,
        num_classes=3,
        stem_width=12,
        stage_widths=(24, 48),
        stage_sizes=(2, 2),
    ),
    "shufflenetv2": functools.partial(
        ShuffleNetV2,
        num_classes=3,
        stem_width=4,
        stage_widths=(8, 12),
        last_width=8,
        stage_sizes=(2, 2),
        stem="cifar",
    ),
}
# The batch norm that makes each family's `stage1_pre`.
NORMS = {
    "vgg": ("stage1_conv2", "norm"),
    "mobilenetv2": ("group2_block2", "project", "norm"),
    "shufflenetv1": ("stage1_block2", "expand", "norm"),
}
SHAPE = (16, 16, 3)


def images(batch=4):
    rng = np.random.default_rng(0)
    return jnp.array(rng.normal(size=(batch, *SHAPE)), jnp.float32)


def loss_and_gradient(network):
    def loss(params, batch_stats, x):
        v = {"params": params, "batch_stats": batch_stats}
        outputs, new = network.apply(v, x, train=True, mutable=["batch_stats"])
        taps = sum(jnp.mean(jnp.square(tap)) for tap in outputs.taps.values())
        return jnp.mean(jnp.square(outputs.logits)) + 0.1 * taps, new

    return jax.value_and_grad(loss, has_aux=True)


@pytest.mark.parametrize("family", SHALLOW)
def test_head_pre_taps_and_norms_belong_to_the_forward_pass(
    family, randomised, quick_jit
):
    network = SHALLOW[family]()
    v = randomised(network, SHAPE)
    outputs = quick_jit(network.apply)(v, images())
    taps = outputs.taps
    assert outputs.head.keys() == {"kernel", "bias"}
    logits = taps["pooled"] @ outputs.head["kernel"] + outputs.head["bias"][None]
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-5, atol=1e-6)
    stages = [name for name in taps if name[-1].isdigit()]
    names = [name for stage in stages for name in (f"{stage}_pre", stage)]
    assert list(taps) == ["stem", *names, "pooled"]
    for stage in stages:
        pre = np.array(taps[f"{stage}_pre"])
        assert pre.min() < 0
        end = pre if family == "mobilenetv2" else np.maximum(pre, 0)
        # The compiler may compute the two apart.
        np.testing.assert_allclose(taps[stage], end, rtol=1e-5, atol=1e-6)
    if family == "shufflenetv2":
        assert outputs.norms == {}
        return
    assert list(outputs.norms) == [f"{stage}_pre" for stage in stages]
    norm = functools.reduce(lambda tree, key: tree[key], NORMS[family], v["params"])
    jax.tree.map(np.testing.assert_array_equal, outputs.norms["stage1_pre"], dict(norm))
    for name, parameters in outputs.norms.items():
        assert parameters.keys() == {"scale", "bias"}
        assert parameters["scale"].shape == taps[name].shape[-1:]


@pytest.mark.parametrize("family", SHALLOW)
def test_training_moves_every_kernel_and_statistic_with_remat(
    family, randomised, quick_jit
):
    network = SHALLOW[family](remat=True)
    v, x = randomised(network, SHAPE), images()
    args = v["params"], v["batch_stats"], x
    assert "remat" in str(jax.make_jaxpr(loss_and_gradient(network))(*args))
    (_, new), gradient = quick_jit(loss_and_gradient(network))(*args)
    old = jax.tree.leaves(v["batch_stats"])
    for before, after in zip(old, jax.tree.leaves(new["batch_stats"]), strict=True):
        assert np.isfinite(after).all() and not np.array_equal(before, after)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        if path[-1].key in ("kernel", "scale"):
            assert np.abs(leaf).max() > 0, path


@pytest.mark.parametrize("family", ["vgg", "shufflenetv1"])
def test_remat_changes_no_number(family, randomised, quick_jit):
    network = SHALLOW[family]()
    v = randomised(network, SHAPE)
    args = v["params"], v["batch_stats"], images()
    one = quick_jit(loss_and_gradient(network))(*args)
    two = quick_jit(loss_and_gradient(SHALLOW[family](remat=True)))(*args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, two
    )


@pytest.mark.parametrize("family", SHALLOW)
def test_bfloat16_is_close_to_float32(family, randomised, quick_jit):
    v, x = randomised(SHALLOW[family](), SHAPE), images()
    exact = quick_jit(SHALLOW[family]().apply)(v, x)
    half = quick_jit(SHALLOW[family](dtype=jnp.bfloat16).apply)(v, x)
    scale = float(jnp.abs(exact.logits).max())
    np.testing.assert_allclose(half.logits, exact.logits, atol=0.05 * scale)
    assert {tap.dtype.name for tap in half.taps.values()} == {"bfloat16", "float32"}
    assert half.taps["stage1"].dtype == half.taps["stage1_pre"].dtype == jnp.bfloat16


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_grouped_convolution_equals_numpy(groups, stride, slow, quick_jit):
    unit = ConvNorm(12, stride=stride, groups=groups, use_bias=True)
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=(2, 5, 7, 6)), jnp.float32)
    v = quick_jit(lambda x: unit.init(jax.random.key(0), x, False))(x)
    assert v["params"]["conv"]["kernel"].shape == (3, 3, 6 // groups, 12)
    np.testing.assert_array_equal(v["params"]["conv"]["bias"], 0)
    expected = slow.norm(v, "norm", slow.conv(v, "conv", np.array(x), stride))
    value = quick_jit(lambda v, x: unit.apply(v, x, False))(v, x)
    np.testing.assert_allclose(value, expected, atol=1e-4)


def test_a_shuffle_is_undone_by_the_shuffle_with_the_other_factor():
    x = jnp.arange(24.0).reshape(2, 12)
    once = channel_shuffle(x, 3)
    assert once[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    np.testing.assert_array_equal(channel_shuffle(once, 4), x)
    np.testing.assert_array_equal(channel_shuffle(x, 1), x)
