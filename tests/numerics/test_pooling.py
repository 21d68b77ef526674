import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.numerics import adaptive_average_pool


def by_slices(x, rows, columns):
    """The definition, cell by cell, in float64."""
    x = np.asarray(x, np.float64)
    height, width = x.shape[1:3]
    y = np.empty((len(x), rows, columns, x.shape[3]))
    for i in range(rows):
        for j in range(columns):
            top, bottom = i * height // rows, int(np.ceil((i + 1) * height / rows))
            left, right = j * width // columns, int(np.ceil((j + 1) * width / columns))
            y[:, i, j] = x[:, top:bottom, left:right].mean((1, 2))
    return y


def maps(height, width):
    rng = np.random.default_rng(height * 100 + width)
    return jnp.asarray(rng.standard_normal((2, height, width, 3)), jnp.float32)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(8, 8, 4, 4), (7, 5, 3, 2), (5, 7, 1, 7), (3, 2, 4, 5), (9, 6, 6, 4)],
)
def test_cells_average_the_pixels_of_the_definition(height, width, rows, columns):
    x = maps(height, width)
    got = adaptive_average_pool(x, (rows, columns))
    assert got.shape == (2, rows, columns, 3)
    np.testing.assert_allclose(got, by_slices(x, rows, columns), rtol=1e-5, atol=1e-6)


def test_one_number_means_a_square_and_one_cell_the_mean():
    x = maps(7, 5)
    np.testing.assert_array_equal(
        adaptive_average_pool(x, 2), adaptive_average_pool(x, (2, 2))
    )
    np.testing.assert_allclose(
        adaptive_average_pool(x, 1)[:, 0, 0], x.mean((1, 2)), rtol=1e-5, atol=1e-6
    )


def test_same_size_is_the_identity():
    x = maps(4, 5)
    np.testing.assert_array_equal(adaptive_average_pool(x, (4, 5)), x)


def test_leading_axes_are_kept():
    x = maps(6, 5)
    got = adaptive_average_pool(x[:, None], (4, 2))
    np.testing.assert_array_equal(got[:, 0], adaptive_average_pool(x, (4, 2)))
    got = adaptive_average_pool(x[0], 3)
    np.testing.assert_allclose(got, adaptive_average_pool(x, 3)[0], rtol=1e-6)


def test_gradient_spreads_a_cell_over_its_pixels():
    def first_cell(x):
        return adaptive_average_pool(x, (2, 1))[0, 0, 0, 0]

    gradient = jax.grad(first_cell)(jnp.zeros((1, 3, 2, 1)))
    # Rows 0 and 1 belong to the first of two cells over three rows.
    np.testing.assert_allclose(gradient[0, :, :, 0], [[0.25] * 2, [0.25] * 2, [0] * 2])


def test_bfloat16_is_averaged_in_float32():
    x = maps(7, 7).astype(jnp.bfloat16)
    got = adaptive_average_pool(x, 3)
    assert got.dtype == jnp.bfloat16
    wide = adaptive_average_pool(x.astype(jnp.float32), 3)
    np.testing.assert_array_equal(got, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("size", [0, (2, 0)])
def test_sizes_below_one_are_rejected(size):
    with pytest.raises(ValueError, match="size must be one or two integers above 0"):
        adaptive_average_pool(maps(4, 4), size)
