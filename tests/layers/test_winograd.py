"""Winograd's form of 3x3 convolutions against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.layers.winograd import (
    winograd_convolution,
    winograd_input_gradient,
    winograd_kernel_gradient,
)

# Even and odd sizes, no padding, uneven padding, one that cuts pixels off.
CASES = {
    "even": ((2, 6, 8, 3), 4, ((1, 1), (1, 1))),
    "odd": ((1, 7, 5, 2), 3, ((1, 1), (1, 1))),
    "valid": ((2, 5, 6, 2), 2, ((0, 0), (0, 0))),
    "uneven": ((2, 4, 5, 3), 2, ((0, 2), (2, 1))),
    "cut": ((2, 8, 7, 2), 3, ((-1, 1), (2, -2))),
    "smallest": ((1, 3, 3, 1), 1, ((0, 0), (0, 0))),
}


def by_definition(images, kernel, padding):
    """Nine shifted products, in float64."""
    edges = [tuple(max(n, 0) for n in pair) for pair in padding]
    x = np.pad(images.astype(np.float64), ((0, 0), *edges, (0, 0)))
    (top, bottom), (left, right) = [tuple(max(-n, 0) for n in pair) for pair in padding]
    x = x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
    rows, columns = x.shape[1] - 2, x.shape[2] - 2
    return sum(
        x[:, i : i + rows, j : j + columns] @ kernel[i, j].astype(np.float64)
        for i in range(3)
        for j in range(3)
    )


@pytest.fixture(params=CASES)
def case(request):
    rng = np.random.default_rng(1)
    shape, features, padding = CASES[request.param]
    images = rng.normal(size=shape).astype(np.float32)
    kernel = rng.normal(size=(3, 3, shape[-1], features)).astype(np.float32)
    results = by_definition(images, kernel, padding)
    gradient = rng.normal(size=results.shape).astype(np.float32)
    return images, kernel, gradient, padding, results


def test_convolution(case):
    images, kernel, _, padding, expected = case
    result = winograd_convolution(jnp.asarray(images), jnp.asarray(kernel), padding)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-5)


def test_gradients_are_adjoint(case):
    """<g, conv(x, k)> = <input_gradient(g, k), x> = <kernel_gradient(x, g), k>."""
    images, kernel, gradient, padding, results = case
    expected = np.vdot(gradient.astype(np.float64), results)
    rng = np.random.default_rng(2)
    to_images = winograd_input_gradient(
        jnp.asarray(gradient), jnp.asarray(kernel), padding
    )
    to_kernel = winograd_kernel_gradient(
        jnp.asarray(images), jnp.asarray(gradient), padding
    )
    assert to_images.shape == images.shape and to_kernel.shape == kernel.shape
    scale = np.abs(gradient).sum()
    assert abs(np.vdot(np.float64(to_images), images) - expected) < 1e-5 * scale
    assert abs(np.vdot(np.float64(to_kernel), kernel) - expected) < 1e-5 * scale
    # The same for any other direction, so that the whole gradient is right.
    x = rng.normal(size=images.shape).astype(np.float32)
    k = rng.normal(size=kernel.shape).astype(np.float32)
    along_x = np.vdot(np.float64(gradient), by_definition(x, kernel, padding))
    along_k = np.vdot(np.float64(gradient), by_definition(images, k, padding))
    assert abs(np.vdot(np.float64(to_images), x) - along_x) < 1e-5 * scale
    assert abs(np.vdot(np.float64(to_kernel), k) - along_k) < 1e-5 * scale


def test_as_near_to_exact_results_as_the_direct_sum():
    rng = np.random.default_rng(3)
    images = rng.normal(size=(2, 16, 16, 64)).astype(np.float32)
    kernel = (rng.normal(size=(3, 3, 64, 64)) / 24).astype(np.float32)
    padding = ((1, 1), (1, 1))
    exact = by_definition(images, kernel, padding)
    direct = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    winograd = winograd_convolution(jnp.asarray(images), jnp.asarray(kernel), padding)
    error = np.abs(winograd - exact).max()
    assert error < 2e-5
    assert error < 20 * np.abs(direct - exact).max()
