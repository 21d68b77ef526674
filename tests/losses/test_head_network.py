"""Squared errors of whole feature maps."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses


def test_sum_over_everything_but_the_batch():
    student = jnp.array([[[[1.0, 2.0]], [[0.0, -1.0]]], [[[3.0, 0.0]], [[0.0, 0.0]]]])
    teacher = jnp.ones((2, 2, 1, 2))
    # (0 + 1 + 1 + 4) and (4 + 1 + 1 + 1).
    values = losses.squared_error_sum(student, teacher)
    np.testing.assert_array_equal(values, [6.0, 7.0])


def test_bfloat16_features_are_summed_in_float32():
    student = jnp.full((1, 1000), 1.0, jnp.bfloat16)
    value = losses.squared_error_sum(student, jnp.zeros((1, 1000), jnp.bfloat16))
    assert value.dtype == jnp.float32 and value.tolist() == [1000.0]


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and teacher features \(2, 4"):
        losses.squared_error_sum(jnp.ones((2, 3)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"where has shape \(3,\); squared errors"):
        losses.squared_error_sum(
            jnp.ones((2, 3)), jnp.ones((2, 3)), where=jnp.ones(3, bool)
        )
