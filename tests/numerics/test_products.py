import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.numerics import product_in_float32


def arrays(dtype, *shape):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), dtype)
    kernel = jnp.asarray(rng.normal(size=(shape[-1], 3)), jnp.float32)
    return x, kernel


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4, 5)])
def test_float32_gives_the_product_and_its_derivatives(shape):
    x, kernel = arrays(jnp.float32, *shape)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(*shape[:-1], 3)))

    def total(product):
        return lambda x, k: jnp.sum(weights * product(x, k) ** 2)

    def twice(product):
        return jax.grad(lambda x: jnp.sum(jax.grad(total(product))(x, kernel) ** 3))(x)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)

    expected = jax.value_and_grad(total(jnp.matmul), (0, 1))(x, kernel)
    got = jax.value_and_grad(total(product_in_float32), (0, 1))(x, kernel)
    jax.tree.map(close, got, expected)
    close(twice(product_in_float32), twice(jnp.matmul))


def test_narrow_operands_are_summed_up_in_float32():
    x, kernel = arrays(jnp.bfloat16, 2, 4096)
    result = product_in_float32(x, kernel)
    assert result.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(
        kernel.astype(jnp.bfloat16), np.float64
    )
    np.testing.assert_allclose(result, exact, rtol=1e-4, atol=1e-3)


def test_no_operand_is_widened_forward_or_backward():
    x, kernel = arrays(jnp.bfloat16, 2, 3, 5)

    def gradients(x, kernel):
        return jax.grad(lambda *a: jnp.sum(product_in_float32(*a) ** 2), (0, 1))(
            x, kernel
        )

    d_x, d_kernel = jax.eval_shape(gradients, x, kernel)
    assert (d_x.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    jaxpr = jax.make_jaxpr(gradients)(x, kernel)
    text = str(jaxpr)
    assert text.count("dot_general") == 3
    assert "f32[2,3,5]" not in text
