"""Convolutions by the pixels of their kernels against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.layers import chunks
from jaxkd.layers.taps import (
    convolution_by_taps,
    input_gradient_by_taps,
    kernel_gradient_by_taps,
)

# Images, kernel, strides, padding.
CASES = {
    "1x1": ((2, 4, 5, 3), (1, 1, 3, 4), (1, 1), ((0, 0), (0, 0))),
    "1x1, stride 2": ((2, 5, 4, 3), (1, 1, 3, 4), (2, 2), ((0, 0), (0, 0))),
    "3x3": ((2, 5, 4, 3), (3, 3, 3, 4), (1, 1), ((1, 1), (1, 1))),
    "3x3, stride 2": ((2, 6, 7, 3), (3, 3, 3, 2), (2, 2), ((1, 1), (1, 1))),
    "same, stride 2": ((2, 6, 6, 3), (3, 3, 3, 2), (2, 2), ((0, 1), (0, 1))),
    "2x2, stride 2": ((1, 6, 6, 2), (2, 2, 2, 3), (2, 2), ((0, 0), (0, 0))),
    "1x3, strides 1 and 3": ((2, 4, 9, 2), (1, 3, 2, 2), (1, 3), ((0, 0), (1, 0))),
    "stride over kernel": ((1, 7, 7, 2), (2, 2, 2, 2), (3, 3), ((0, 0), (0, 0))),
    "cut": ((1, 7, 8, 2), (3, 3, 2, 2), (2, 1), ((-1, 2), (1, -2))),
}


@pytest.fixture(params=CASES)
def case(request):
    shape, kernel_shape, strides, padding = CASES[request.param]
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=kernel_shape), jnp.float32)

    def convolve(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    results, pullback = jax.vjp(convolve, images, kernel)
    gradient = jnp.asarray(rng.normal(size=results.shape), jnp.float32)
    return images, kernel, gradient, strides, padding, results, pullback(gradient)


@pytest.fixture(params=["all at once", "image by image"])
def budget(request, monkeypatch):
    if request.param == "image by image":
        monkeypatch.setattr(chunks, "_BUDGET", 1)


def same(result, expected):
    assert result.shape == expected.shape and result.dtype == expected.dtype
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_convolution(case, budget):
    images, kernel, _, strides, padding, expected, _ = case
    same(
        convolution_by_taps(images, kernel, strides=strides, padding=padding), expected
    )


def test_input_gradient(case, budget):
    images, kernel, gradient, strides, padding, _, (expected, _) = case
    result = input_gradient_by_taps(
        gradient,
        kernel,
        image_size=images.shape[1:3],
        strides=strides,
        padding=padding,
    )
    same(result, expected)


def test_kernel_gradient(case, budget):
    images, kernel, gradient, strides, padding, _, (_, expected) = case
    result = kernel_gradient_by_taps(
        images, gradient, size=kernel.shape[:2], strides=strides, padding=padding
    )
    same(result, expected)
