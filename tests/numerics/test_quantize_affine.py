"""The affine quantiser: numbers by hand, its error, and its special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import numerics

# Programs that run once: most of their time is compilation.
QUICK = {"compiler_options": {"xla_backend_optimization_level": 0}}
affine_quantize = jax.jit(
    numerics.affine_quantize, static_argnames=("bits", "per_sample"), **QUICK
)
affine_dequantize = jax.jit(numerics.affine_dequantize, **QUICK)


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def test_numbers_by_hand():
    # Range 3 in 2^2 - 1 steps: scale 1; the zero point is trunc(1.5) = 1. The values
    # before rounding are -0.5 (clipped to 0), 0.5, 1.5 and 2.5; halves go to even.
    q = affine_quantize(jnp.array([[-1.5, -0.5, 0.5, 1.5]]), bits=2)
    assert q.values.dtype == jnp.uint8 and q.zero_point.dtype == jnp.int32
    assert q.scale.tolist() == [1.0] and q.zero_point.tolist() == [1]
    assert q.values.tolist() == [[0, 0, 2, 2]]
    assert affine_dequantize(q).tolist() == [[-1.0, -1.0, 1.0, 1.0]]


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_error_is_below_one_step(bits):
    x = normal(3, 7, 5)
    q = affine_quantize(x, bits=bits)
    assert int(q.values.max()) <= 2**bits - 1
    # Half a step for rounding, less than one for the truncated zero point.
    error = jnp.abs(affine_dequantize(q) - x).max(axis=(1, 2))
    assert jnp.all(error < 1.01 * q.scale)


def test_per_sample_is_each_example_alone():
    x = normal(3, 4, 4, 2) * jnp.array([0.1, 1.0, 30.0]).reshape(3, 1, 1, 1)
    together = affine_quantize(x)
    assert together.scale.shape == together.zero_point.shape == (3,)
    for i in range(3):
        alone = affine_quantize(x[i : i + 1], per_sample=False)
        assert alone.scale.shape == alone.zero_point.shape == ()
        np.testing.assert_array_equal(together.values[i], alone.values[0])
        np.testing.assert_allclose(together.scale[i], alone.scale, rtol=1e-6)
        assert together.zero_point[i] == alone.zero_point


def test_one_scale_for_the_batch_makes_examples_depend_on_each_other():
    x = jnp.stack([jnp.linspace(-1.0, 1.0, 9), jnp.linspace(-50.0, 50.0, 9)])
    shared = affine_dequantize(affine_quantize(x, per_sample=False))
    own = affine_dequantize(affine_quantize(x))
    assert jnp.abs(shared - x)[0].max() > 10 * jnp.abs(own - x)[0].max()


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("constant", [0.0, 2.7, -3.1e-3, 1e30])
def test_a_constant_tensor_comes_back_exactly(constant, per_sample):
    x = jnp.full((2, 3, 3), constant, jnp.float32)
    q = affine_quantize(x, per_sample=per_sample)
    np.testing.assert_array_equal(q.values, 0)
    np.testing.assert_array_equal(affine_dequantize(q), x)


def test_a_constant_example_beside_others():
    x = normal(2, 4).at[0].set(0.3)
    restored = affine_dequantize(affine_quantize(x))
    np.testing.assert_array_equal(restored[0], x[0])
    np.testing.assert_allclose(restored[1], x[1], atol=0.02)


def test_values_far_from_zero_are_clipped_as_published():
    q = affine_quantize(jnp.array([[10.0, 10.5, 11.0]]))
    assert q.zero_point.tolist() == [0] and q.values.tolist() == [[255, 255, 255]]


def test_zero_is_exact_where_the_range_holds_it():
    x = normal(4, 20).at[:, 3].set(0.0)
    np.testing.assert_array_equal(affine_dequantize(affine_quantize(x))[:, 3], 0.0)


def test_jit_equals_no_jit_and_bfloat16_is_widened():
    x = normal(2, 5, 3).astype(jnp.bfloat16)
    plain, jitted = numerics.affine_quantize(x), affine_quantize(x)
    np.testing.assert_array_equal(plain.values, jitted.values)
    np.testing.assert_allclose(plain.scale, jitted.scale, rtol=1e-6)
    wide = affine_quantize(x.astype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, jitted, wide)
    assert affine_dequantize(plain).dtype == jnp.float32


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
        affine_quantize(jnp.ones((1, 2)), bits=bits)
