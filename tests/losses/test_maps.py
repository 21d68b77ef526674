import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.losses.maps import pool_to_smallest


def test_every_map_is_averaged_to_the_smallest_height_and_width():
    tall = jnp.arange(8.0).reshape(1, 4, 2, 1)
    wide = jnp.arange(12.0).reshape(1, 2, 3, 2)
    first, second = pool_to_smallest(tall, wide, what="maps")
    np.testing.assert_array_equal(first[0, :, :, 0], [[1, 2], [5, 6]])
    assert second.shape == (1, 2, 2, 2)
    # Three columns in two cells share the middle one.
    np.testing.assert_array_equal(second[0, 0, :, 0], [1, 3])


def test_maps_of_one_size_stay_as_they_are_but_in_float32():
    x = jnp.arange(4.0, dtype=jnp.bfloat16).reshape(1, 2, 2, 1)
    (same,) = pool_to_smallest(x, what="maps")
    assert same.dtype == jnp.float32
    np.testing.assert_array_equal(same, x.astype(jnp.float32))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="factors must be .* got shape"):
        pool_to_smallest(jnp.zeros((1, 2)), what="factors")
