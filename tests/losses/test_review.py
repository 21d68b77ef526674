import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def squares(difference, cells):
    """Mean square of averages over `cells` x `cells` blocks."""
    b, h, w, c = difference.shape
    blocks = difference.reshape(b, cells, h // cells, cells, w // cells, c)
    return (blocks.mean((2, 4)) ** 2).mean((1, 2, 3))


def test_all_levels_take_part_in_a_large_map():
    student, teacher = normal(2, 8, 8, 3), normal(2, 8, 8, 3, seed=1)
    d = np.float64(student) - np.float64(teacher)
    expected = (
        squares(d, 8) + squares(d, 4) / 2 + squares(d, 2) / 4 + squares(d, 1) / 8
    ) / 1.875
    np.testing.assert_allclose(
        losses.hierarchical_context(student, teacher), expected, rtol=1e-5
    )


def test_levels_left_out_do_not_halve_the_weight():
    student, teacher = normal(2, 4, 4, 3), normal(2, 4, 4, 3, seed=1)
    d = np.float64(student) - np.float64(teacher)
    expected = (squares(d, 4) + squares(d, 2) / 2 + squares(d, 1) / 4) / 1.75
    np.testing.assert_allclose(
        losses.hierarchical_context(student, teacher), expected, rtol=1e-5
    )


def test_a_single_pixel_has_one_level():
    student, teacher = normal(2, 1, 1, 3), normal(2, 1, 1, 3, seed=1)
    np.testing.assert_allclose(
        losses.hierarchical_context(student, teacher),
        losses.hint(student, teacher),
        rtol=1e-6,
    )


def test_pooling_sees_only_low_frequencies():
    checkerboard = (jnp.indices((4, 4)).sum(0) % 2 * 2.0 - 1)[None, :, :, None]
    value = losses.hierarchical_context(checkerboard, jnp.zeros_like(checkerboard))
    np.testing.assert_allclose(value, 1 / 1.75, rtol=1e-6)


def test_only_maps_are_accepted():
    with pytest.raises(ValueError, match=r"must be \[batch, height, width, channels\]"):
        losses.hierarchical_context(normal(2, 3), normal(2, 3))
    with pytest.raises(ValueError, match="a connector must make them equal"):
        losses.hierarchical_context(normal(2, 3, 3, 1), normal(2, 3, 3, 2))
