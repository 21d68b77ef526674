"""Layers in numpy, for networks rebuilt from their published description."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def _convolve(x, parameters, stride=1):
    """Cross-correlation, padded by half the kernel on every side.

    A kernel of fewer input channels than the map has is one of consecutive groups.
    """
    kernel = np.array(parameters["kernel"])
    groups = x.shape[-1] // kernel.shape[2]
    if groups > 1:
        kernels = np.split(kernel, groups, axis=-1)
        parts = zip(np.split(x, groups, axis=-1), kernels, strict=True)
        return np.concatenate(
            [_convolve(part, {"kernel": one}, stride) for part, one in parts], axis=-1
        )
    k, half = kernel.shape[0], kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    rows = (x.shape[1] + 2 * half - k) // stride + 1
    columns = (x.shape[2] + 2 * half - k) // stride + 1
    out = np.zeros((x.shape[0], rows, columns, kernel.shape[-1]))
    for i in range(k):
        for j in range(k):
            shifted = padded[:, i : i + stride * rows, j : j + stride * columns]
            out += shifted[:, ::stride, ::stride] @ kernel[i, j]
    return out + np.array(parameters.get("bias", 0))


def _normalise(x, parameters, statistics):
    z = x - np.array(statistics["mean"])
    z /= np.sqrt(np.array(statistics["var"]) + 1e-5)
    return z * np.array(parameters["scale"]) + np.array(parameters["bias"])


def _pool(x, window, padding=0):
    """Max-pooling of stride 2."""
    edge = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = np.pad(x, edge, constant_values=-np.inf)
    rows = (padded.shape[1] - window) // 2 + 1
    columns = (padded.shape[2] - window) // 2 + 1
    shifts = [
        padded[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2][:, :rows, :columns]
        for i in range(window)
        for j in range(window)
    ]
    return np.max(shifts, axis=0)


def _bilinear(x, size):
    """Interpolation with aligned corners, one axis after the other."""
    for axis, m in ((1, size[0]), (2, size[1])):
        position = np.linspace(0, x.shape[axis] - 1, m)
        low = np.minimum(position.astype(int), x.shape[axis] - 1)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        share = np.expand_dims(position - low, tuple({0, 1, 2, 3} - {axis}))
        x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
    return x


def _nearest_double(x):
    return x.repeat(2, axis=1).repeat(2, axis=2)


def _relu(x):
    return np.maximum(x, 0)


def _at(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


@pytest.fixture(scope="session")
def slow():
    """Layers in numpy; the parameter trees are those of the networks under test."""

    def conv(v, path, x, stride=1):
        return _convolve(x, _at(v["params"], path), stride)

    def norm(v, path, x):
        return _normalise(x, _at(v["params"], path), _at(v["batch_stats"], path))

    def basic_block(v, path, x, stride):
        y = _relu(norm(v, f"{path}/norm1", conv(v, f"{path}/conv1", x, stride)))
        y = norm(v, f"{path}/norm2", conv(v, f"{path}/conv2", y))
        if stride != 1 or x.shape[-1] != y.shape[-1]:
            x = conv(v, f"{path}/shortcut/conv", x, stride)
            x = norm(v, f"{path}/shortcut/norm", x)
        return _relu(x + y)

    return types.SimpleNamespace(
        conv=conv,
        norm=norm,
        basic_block=basic_block,
        pool=_pool,
        bilinear=_bilinear,
        nearest_double=_nearest_double,
        relu=_relu,
    )


@functools.cache  # tracing a deep network takes a second
def _abstract(network, image_shape, batch=1):
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    return variables, jax.eval_shape(network.apply, variables, images)


@pytest.fixture(scope="session")
def abstract():
    """Variables and outputs of a network as shapes: no arrays, no compilation."""
    return _abstract


@pytest.fixture(scope="session")
def count():
    """The number of parameters of a network."""

    def parameters(network, image_shape):
        variables, _ = _abstract(network, image_shape)
        return sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))

    return parameters


@pytest.fixture(scope="session")
def randomised():
    """Random variables of a network: every number matters, no variance is small."""

    def draw(network, image_shape, seed=0):
        rng = np.random.default_rng(seed)

        def leaf(path, x):
            if path[-1].key in ("scale", "var"):
                return jnp.array(rng.uniform(0.5, 1.5, x.shape), jnp.float32)
            spread = 1 / math.sqrt(max(1, math.prod(x.shape[:-1])))
            return jnp.array(rng.normal(0, spread, x.shape), jnp.float32)

        variables, _ = _abstract(network, image_shape)
        return jax.tree.map_with_path(leaf, variables)

    return draw


@pytest.fixture(scope="session")
def quick_jit():
    """`jax.jit` for programs that run once: most of their time is compilation."""
    return functools.partial(
        jax.jit, compiler_options={"xla_backend_optimization_level": 0}
    )
