"""Max-pooling against loops over windows in numpy, its gradient included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.layers import max_pool

CASES = [(2, 2, 0), (3, 2, 1), (3, 1, 1), (3, 3, 0), (2, 1, 1), (5, 2, 2), (2, 3, 0)]


def pool_slowly(x, g, window, stride, padding):
    """Maxima, and the gradient of `sum(g * maxima)` with ties to the first pixel."""
    b, h, w, c = x.shape
    rows = (h + 2 * padding - window) // stride + 1
    columns = (w + 2 * padding - window) // stride + 1
    out = np.zeros((b, rows, columns, c), x.dtype)
    gradient = np.zeros_like(x)
    for at in np.ndindex(out.shape):
        n, i, j, k = at
        best, where = -np.inf, None
        for row in range(i * stride - padding, i * stride - padding + window):
            for column in range(j * stride - padding, j * stride - padding + window):
                inside = 0 <= row < h and 0 <= column < w
                if inside and x[n, row, column, k] > best:
                    best, where = x[n, row, column, k], (n, row, column, k)
        out[at] = best
        gradient[where] += g[at] if g is not None else 0
    return out, gradient


def maps(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("window, stride, padding", CASES)
def test_values_and_gradients_equal_the_definition(window, stride, padding):
    # Rounded and rectified, so that ties are everywhere, as after a ReLU.
    x = np.maximum(np.round(2 * maps(2, 7, 8, 3)), 0)

    def pool(x):
        return max_pool(x, window=window, stride=stride, padding=padding)

    out = jax.jit(pool)(jnp.array(x))
    g = maps(*out.shape, seed=1)
    expected, gradient = pool_slowly(x, g, window, stride, padding)
    np.testing.assert_array_equal(out, expected)
    actual = jax.jit(jax.grad(lambda x: jnp.sum(pool(x) * g)))(jnp.array(x))
    np.testing.assert_allclose(actual, gradient, rtol=1e-6, atol=1e-6)


def test_ties_go_to_the_first_pixel_of_the_window():
    x = jnp.array([[1.0, 3.0], [3.0, 3.0]]).reshape(1, 2, 2, 1)
    gradient = jax.grad(lambda x: max_pool(x, window=2, stride=2).sum())(x)
    assert gradient.ravel().tolist() == [0, 1, 0, 0]


def test_padding_never_wins():
    x = jnp.full((1, 3, 3, 1), -5.0)
    out = max_pool(x, window=3, stride=2, padding=1)
    np.testing.assert_array_equal(out, np.full((1, 2, 2, 1), -5.0))


def test_odd_maps_lose_their_last_row_without_padding():
    x = jnp.arange(25.0).reshape(1, 5, 5, 1)
    out = max_pool(x, window=2, stride=2)
    assert out[0, :, :, 0].tolist() == [[6, 8], [16, 18]]


def test_bfloat16_stays_bfloat16():
    x = jnp.array(maps(1, 4, 4, 2)).astype(jnp.bfloat16)
    out, vjp = jax.vjp(lambda x: max_pool(x, window=2, stride=2), x)
    assert out.dtype == jnp.bfloat16
    assert vjp(out)[0].dtype == jnp.bfloat16


def test_a_nan_is_not_hidden():
    x = jnp.ones((1, 2, 2, 1)).at[0, 0, 1, 0].set(jnp.nan)
    assert jnp.isnan(max_pool(x, window=2, stride=2)).all()


def test_the_gradient_needs_no_select_and_scatter():
    def loss(x):
        return jnp.sum(max_pool(x, window=3, stride=2, padding=1) ** 2)

    x = jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32)
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(loss))(x))


def test_batching_by_vmap_equals_the_batch_axis():
    x = jnp.array(maps(3, 6, 6, 2))

    gradient = jax.grad(lambda x: jnp.sum(max_pool(x, window=2, stride=2) ** 2))
    batched = jax.jit(jax.vmap(gradient))(x)
    np.testing.assert_array_equal(batched, jax.jit(gradient)(x))


def test_eight_devices_equal_one_and_exchange_nothing():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch = jax.NamedSharding(mesh, jax.P("data"))
    x = jnp.array(maps(8, 6, 6, 2))
    gradient = jax.grad(lambda x: jnp.sum(max_pool(x, window=3, stride=2) ** 2))
    step = jax.jit(gradient, in_shardings=over_batch, out_shardings=over_batch)
    np.testing.assert_array_equal(step(x), jax.jit(gradient)(x))
    text = step.lower(x).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


def test_impossible_windows_are_refused():
    x = jnp.zeros((1, 2, 2, 1))
    with pytest.raises(ValueError, match="padding must be 0 to 1"):
        max_pool(x, window=3, stride=2, padding=2)
    with pytest.raises(ValueError, match="2x2 are smaller than a window of 3"):
        max_pool(x, window=3, stride=1)
