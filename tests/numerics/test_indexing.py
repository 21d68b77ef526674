"""Gathers with constant indices against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.numerics import along_axis, take_constant


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_taking_equals_numpy(axis):
    x = np.arange(24.0).reshape(2, 3, 4)
    index = np.array([1, 0, 1])
    out = take_constant(jnp.array(x), index, axis)
    np.testing.assert_array_equal(out, np.take(x, index, axis))


def test_a_vector_is_laid_along_one_axis():
    x = jnp.ones((2, 3, 4))
    assert along_axis(np.arange(3), -2, x).shape == (1, 3, 1)
    assert (x * along_axis(np.arange(4.0), 2, x))[1, 2].tolist() == [0, 1, 2, 3]
