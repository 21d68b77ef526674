"""Work on a few images at a time gives what work on all of them gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.layers import chunks

IMAGES = np.random.default_rng(0).normal(size=(6, 4, 5, 2)).astype(np.float32)


def double(images):
    return jnp.concatenate([images, 2 * images], axis=-1)


def moments(images, others):
    return [jnp.sum(images * others, axis=0), jnp.sum(images)]


@pytest.fixture(params=[1, 2, 3, 4, 5, 6, 100])
def at_once(request, monkeypatch):
    """So many images stay within the budget."""
    monkeypatch.setattr(chunks, "_BUDGET", 10 * request.param)
    return request.param


def is_loop(function, *args):
    """Whether a function goes round in one loop."""
    text = str(jax.make_jaxpr(function)(*args))
    assert text.count("while[") + text.count("scan[") <= 1
    return "while[" in text or "scan[" in text


def test_map_images(at_once):
    function = jax.jit(lambda x: chunks.map_images(double, x, values=10))
    np.testing.assert_array_equal(function(IMAGES), double(IMAGES))
    assert is_loop(function, IMAGES) == (at_once < 6)


def test_sum_images(at_once):
    others = IMAGES[::-1].copy()
    function = jax.jit(lambda x, y: chunks.sum_images(moments, x, y, values=10))
    for result, expected in zip(
        function(IMAGES, others), moments(IMAGES, others), strict=True
    ):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    assert is_loop(function, IMAGES, others) == (at_once < 6)


def test_a_divisor_within_the_budget_or_a_rest(monkeypatch):
    monkeypatch.setattr(chunks, "_BUDGET", 40)
    sizes = [chunks._images_at_once(12, values) for values in (1, 5, 8, 11, 40, 99)]
    assert sizes == [(12, 0), (6, 0), (4, 0), (3, 0), (1, 0), (1, 0)]
    assert chunks._images_at_once(7, 10) == (4, 3)  # prime
    assert chunks._images_at_once(127, 1) == (40, 7)
