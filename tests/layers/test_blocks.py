"""Blocks against the same formulas in numpy, and the initialisers' statistics."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import layers


def abstract(block, x):
    """The shapes of a block's variables."""
    return jax.eval_shape(
        lambda key, x: block.init(key, x, False), jax.random.key(0), x
    )


def randomised(variables, seed=0):
    """Variables of the same shapes, all drawn at random (variances positive)."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.array(rng.uniform(0.2, 1.0, leaf.shape), jnp.float32),
        variables,
    )


def convolve(x, conv, stride=1):
    """Cross-correlation, padded by half the kernel on every side."""
    kernel = np.array(conv["kernel"])
    k, half = kernel.shape[0], kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    rows = (x.shape[1] + 2 * half - k) // stride + 1
    columns = (x.shape[2] + 2 * half - k) // stride + 1
    out = np.zeros((x.shape[0], rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            patch = padded[:, i * stride : i * stride + k, j * stride : j * stride + k]
            out[:, i, j] = np.einsum("nhwc,hwco->no", patch, kernel)
    return out + np.array(conv.get("bias", 0))


def normalise(x, params, stats):
    z = (x - np.array(stats["mean"])) / np.sqrt(np.array(stats["var"]) + 1e-5)
    return z * np.array(params["scale"]) + np.array(params["bias"])


def relu(x):
    return np.maximum(x, 0)


def reference(kind, v, x, stride):
    p, s = v["params"], v["batch_stats"]

    def norm(name, x):
        return normalise(x, p[name], s[name])

    if kind is layers.DoubleConv:
        for unit in ("unit1", "unit2"):
            x = convolve(x, p[unit]["conv"])
            x = relu(normalise(x, p[unit]["norm"], s[unit]["norm"]))
        return x
    if kind is layers.PreActivationBlock:
        active = relu(norm("norm1", x))
        y = relu(norm("norm2", convolve(active, p["conv1"], stride)))
        y = convolve(y, p["conv2"])
        return y + (convolve(active, p["shortcut"], stride) if "shortcut" in p else x)
    if kind is layers.BasicBlock:
        y = relu(norm("norm1", convolve(x, p["conv1"], stride)))
        y = norm("norm2", convolve(y, p["conv2"]))
    else:
        y = relu(norm("norm1", convolve(x, p["conv1"])))
        y = relu(norm("norm2", convolve(y, p["conv2"], stride)))
        y = norm("norm3", convolve(y, p["conv3"]))
    if "shortcut" in p:
        x = convolve(x, p["shortcut"]["conv"], stride)
        x = normalise(x, p["shortcut"]["norm"], s["shortcut"]["norm"])
    return relu(x + y)


@pytest.mark.parametrize("stride, width", [(1, 8), (1, 12), (2, 8)])
@pytest.mark.parametrize(
    "kind",
    [
        layers.BasicBlock,
        layers.Bottleneck,
        layers.PreActivationBlock,
        layers.DoubleConv,
    ],
)
def test_blocks_equal_numpy(kind, stride, width):
    options = {} if kind is layers.DoubleConv else {"stride": stride}
    block = kind(width, **options)
    # Seven rows: at stride 2 symmetric padding differs from "SAME" for six columns.
    x = np.random.default_rng(1).normal(size=(2, 7, 6, 8)).astype(np.float32)
    v = randomised(abstract(block, x))
    out = jax.jit(block.apply, static_argnums=2)(v, jnp.array(x), False)
    expected = reference(kind, v, x, stride)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_the_shortcut_has_parameters_only_where_shapes_change():
    def parts(block):
        return abstract(block, jnp.zeros((1, 4, 4, 8)))["params"].keys()

    for kind in (layers.BasicBlock, layers.Bottleneck, layers.PreActivationBlock):
        assert "shortcut" not in parts(kind(8))
        assert "shortcut" in parts(kind(16))
        assert "shortcut" in parts(kind(8, stride=2))


def test_bfloat16_blocks_have_float32_parameters():
    x = jnp.ones((2, 4, 4, 8))
    block = layers.Bottleneck(16, dtype=jnp.bfloat16)
    v = abstract(block, x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(v))
    out = jax.eval_shape(lambda v, x: block.apply(v, x, False), v, x)
    assert out.dtype == jnp.bfloat16


def test_kaiming_normal_has_variance_two_over_fan_out():
    kernel = layers.kaiming_normal(jax.random.key(0), (3, 3, 64, 32), jnp.float32)
    np.testing.assert_allclose(np.std(kernel), math.sqrt(2 / (9 * 32)), rtol=0.02)
    # Not truncated: a normal of this size has entries beyond three deviations.
    assert np.abs(kernel).max() > 3.3 * math.sqrt(2 / (9 * 32))


@pytest.mark.parametrize("shape, fan_in", [((3, 3, 16, 32), 144), ((64, 256), 64)])
def test_fan_in_uniform_is_within_one_over_root_fan_in(shape, fan_in):
    kernel = np.array(layers.fan_in_uniform(jax.random.key(0), shape, jnp.float32))
    bound = 1 / math.sqrt(fan_in)
    assert 0.98 * bound < kernel.max() <= bound and -bound <= kernel.min()
    np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.05)


def test_biased_convolutions_draw_biases_from_their_kernel_fan_in():
    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"in_features": x.shape[-1], "dtype": jnp.float32}
            return layers.biased_conv(4096, kernel_size=3, name="conv", **options)(x)

    v = One().init(jax.random.key(0), jnp.zeros((1, 3, 3, 4)))
    bias = np.array(v["params"]["conv"]["bias"])
    assert 0.98 / 6 < bias.max() <= 1 / 6 and -1 / 6 <= bias.min() < -0.98 / 6
