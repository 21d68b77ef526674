"""The norms against numpy, Flax and automatic differentiation of their formulas."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.layers import BatchNorm, LayerNorm
from jaxkd.layers.norm import _normalize


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def variables(channels, seed=0):
    rng = np.random.default_rng(seed)

    def positive():
        return jnp.array(rng.uniform(0.5, 2.0, channels), jnp.float32)

    def signed():
        return jnp.array(rng.normal(size=channels), jnp.float32)

    return {
        "params": {"scale": positive(), "bias": signed()},
        "batch_stats": {"mean": signed(), "var": positive()},
    }


def formula(x, scale, bias, epsilon=1e-5):
    """The definition, for automatic differentiation."""
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes, keepdims=True)
    var = jnp.mean(jnp.square(x - mean), axes, keepdims=True)
    shape = (1,) * (x.ndim - 1) + (-1,)
    y = (x - mean) / jnp.sqrt(var + epsilon) * scale.reshape(shape)
    return y + bias.reshape(shape), mean.ravel(), var.ravel()


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (7, 6)])
def test_training_normalises_by_the_batch(shape):
    x, v = data(*shape), variables(6)
    y, _ = BatchNorm().apply(v, jnp.array(x), True, mutable=["batch_stats"])
    axes = tuple(range(x.ndim - 1))
    z = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5)
    expected = z * np.array(v["params"]["scale"]) + np.array(v["params"]["bias"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_running_statistics_move_a_tenth_and_the_variance_is_unbiased():
    x, v = 3 + 2 * data(4, 3, 5, 6), variables(6)
    _, new = BatchNorm().apply(v, jnp.array(x), True, mutable=["batch_stats"])
    rows = x.reshape(-1, 6).astype(np.float64)
    old = jax.tree.map(np.array, v["batch_stats"])
    mean = 0.9 * old["mean"] + 0.1 * rows.mean(0)
    var = 0.9 * old["var"] + 0.1 * rows.var(0, ddof=1)
    np.testing.assert_allclose(new["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], var, rtol=1e-5)


def test_evaluation_uses_the_running_statistics_and_leaves_them():
    x, v = data(2, 3, 3, 4), variables(4)
    y, new = BatchNorm().apply(v, jnp.array(x), False, mutable=["batch_stats"])
    s = jax.tree.map(np.array, v)
    z = (x - s["batch_stats"]["mean"]) / np.sqrt(s["batch_stats"]["var"] + 1e-5)
    expected = z * s["params"]["scale"] + s["params"]["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], v["batch_stats"])


def test_initialisation_in_training_mode_leaves_the_statistics():
    v = BatchNorm().init(jax.random.key(0), 5 + jnp.array(data(4, 4, 4, 3)), True)
    np.testing.assert_array_equal(v["batch_stats"]["mean"], np.zeros(3))
    np.testing.assert_array_equal(v["batch_stats"]["var"], np.ones(3))
    assert set(v["params"]) == {"scale", "bias"}


def test_gradients_equal_autodiff_of_the_definition():
    x, near = jnp.array(data(4, 3, 5, 6)), jnp.array(data(6, seed=3))
    p = variables(6)["params"]
    cotangents = (
        jnp.array(data(4, 3, 5, 6, seed=1)),
        jnp.array(data(6, seed=4)),  # the moments are differentiable as well
        jnp.array(data(6, seed=5)),
    )

    def ours(x, scale, bias):
        return _normalize(x, scale, bias, near, 1e-5)

    args = (x, p["scale"], p["bias"])
    actual = jax.vjp(ours, *args)[1](cotangents)
    expected = jax.vjp(formula, *args)[1](cotangents)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-4, atol=2e-5)


def test_the_result_does_not_depend_on_the_running_mean():
    x, p = jnp.array(data(4, 3, 5, 6)), variables(6)["params"]
    first = _normalize(x, p["scale"], p["bias"], jnp.zeros(6), 1e-5)
    second = _normalize(x, p["scale"], p["bias"], jnp.full(6, 2.0), 1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        first,
        second,
    )


def test_a_small_variance_beside_a_large_mean_survives_in_float32():
    x = 1000 + 0.1 * data(64, 8, 8, 2)
    v = variables(2)
    v["batch_stats"]["mean"] = jnp.full(2, 999.9)
    y, _ = BatchNorm().apply(v, jnp.array(x), True, mutable=["batch_stats"])
    exact = x.astype(np.float64)
    z = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-5)
    expected = z * np.array(v["params"]["scale"]) + np.array(v["params"]["bias"])
    np.testing.assert_allclose(y, expected, atol=5e-3)


def test_constant_channels_and_single_pixels_stay_finite():
    v = variables(3)

    def loss(x):
        y, new = BatchNorm().apply(v, x, True, mutable=["batch_stats"])
        return jnp.sum(y**2), new

    for x in (jnp.full((2, 2, 2, 3), 1e4), jnp.ones((1, 1, 1, 3))):
        (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(x)
        assert np.isfinite(value) and np.isfinite(gradient).all()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


def test_bfloat16_goes_in_and_out_and_statistics_stay_float32():
    x, v = jnp.array(data(4, 4, 4, 3)), variables(3)
    half = x.astype(jnp.bfloat16)
    norm = BatchNorm(dtype=jnp.bfloat16)
    y, new = norm.apply(v, half, True, mutable=["batch_stats"])
    exact, _ = BatchNorm().apply(
        v, half.astype(jnp.float32), True, mutable=["batch_stats"]
    )
    assert y.dtype == jnp.bfloat16
    assert new["batch_stats"]["var"].dtype == jnp.float32
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_eight_devices_normalise_by_the_global_batch():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, v = jnp.array(data(16, 2, 2, 3)), variables(3)

    def step(v, x):
        def loss(params):
            y, new = BatchNorm().apply({**v, "params": params}, x, True, mutable=True)
            return jnp.sum(jnp.sin(y)), new

        return jax.value_and_grad(loss, has_aux=True)(v["params"])

    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.jit(step)(v, sharded),
        jax.jit(step)(v, x),
    )


def tokens(dtype=jnp.float32):
    """Tokens far from zero, whose variance a single pass would lose."""
    x = jnp.asarray(data(2, 5, 16) + 100.0, dtype)
    params = variables(16)["params"]
    return x, params


def layer_norms(dtype=jnp.float32):
    options = {"epsilon": 1e-6, "dtype": dtype}
    flax_norm = nn.LayerNorm(use_fast_variance=False, **options)
    return LayerNorm(**options), flax_norm


def test_layer_norm_is_that_of_flax_with_its_parameters():
    x, params = tokens()
    ours, reference = layer_norms()
    drawn = ours.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(
        jnp.shape, reference.init(jax.random.key(0), x)
    )
    y, expected = (m.apply({"params": params}, x) for m in (ours, reference))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_layer_norm_has_derivatives_of_every_kind():
    x, params = tokens()
    direction = jnp.asarray(data(2, 5, 16, seed=1))

    def of(norm):
        def total(params, x):
            return jnp.sum(jnp.tanh(norm.apply({"params": params}, x)) * direction)

        gradient = jax.jit(jax.grad(total, (0, 1)))
        _, tangent = jax.jvp(lambda x: total(params, x), (x,), (direction,))
        curvature = jax.grad(lambda x: jnp.vdot(gradient(params, x)[1], direction))(x)
        return gradient(params, x), tangent, curvature

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3),
        *map(of, layer_norms()),
    )


def test_layer_norm_of_narrow_tokens_keeps_them_narrow_and_computes_wide():
    x, params = tokens(jnp.bfloat16)
    ours, _ = layer_norms(jnp.bfloat16)
    y, pull = jax.vjp(lambda x: ours.apply({"params": params}, x), x)
    _, reference = layer_norms()
    expected = reference.apply({"params": params}, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0.01, atol=0.02)
    kept = [a for a in jax.tree.leaves(pull) if a.shape == x.shape]
    assert kept and all(a.dtype == jnp.bfloat16 for a in kept)
