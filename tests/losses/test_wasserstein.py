import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import losses
from jaxkd.losses.unit_vectors import unit_vectors


def test_gradient_penalty_is_the_squared_distance_of_the_norm_from_one():
    x = np.random.default_rng(0).standard_normal((4, 3, 2, 5)).astype(np.float32)
    norms = np.linalg.norm(x.reshape(4, -1), axis=1)
    value = losses.gradient_penalty(jnp.asarray(x))
    np.testing.assert_allclose(value, (norms - 1) ** 2, rtol=1e-5)


def test_gradient_penalty_has_no_gradient_at_zero():
    zero = jnp.zeros((2, 3))
    gradient = jax.grad(lambda x: losses.gradient_penalty(x).sum())(zero)
    np.testing.assert_array_equal(gradient, 0)


def test_unit_vectors_have_the_gradient_of_their_formula_at_zero():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [0.0, 1e-3]])
    unit = unit_vectors(x, eps=0.5)
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0], [0, 2e-3]], rtol=1e-6)
    jacobian = jax.jacobian(lambda v: unit_vectors(v, eps=0.5))(x[1])
    np.testing.assert_array_equal(jacobian, 2.0 * np.eye(2))
