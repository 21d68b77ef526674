"""Resizing against slow per-pixel references written in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.numerics import resize_bilinear, resize_nearest

# (4, 40) and (2, 96) have inputs with more readers than the unrolled sum takes.
LENGTHS = [(4, 4), (4, 8), (5, 12), (12, 5), (7, 3), (1, 6), (6, 1), (2, 96), (96, 2)]


def bilinear_slowly(x, size, align_corners):
    """Pixel by pixel, in float64: the definition."""
    b, h, w, c = x.shape
    out = np.zeros((b, *size, c))

    def source(i, n, m):
        if align_corners:
            position = i * (n - 1) / (m - 1) if m > 1 else 0.0
        else:
            position = max((i + 0.5) * n / m - 0.5, 0.0)
        low = min(int(position), n - 1)
        return low, min(low + 1, n - 1), position - low

    for i in range(size[0]):
        top, bottom, down = source(i, h, size[0])
        for j in range(size[1]):
            left, right, across = source(j, w, size[1])
            upper = x[:, top, left] * (1 - across) + x[:, top, right] * across
            lower = x[:, bottom, left] * (1 - across) + x[:, bottom, right] * across
            out[:, i, j] = upper * (1 - down) + lower * down
    return out


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("rows, new_rows", LENGTHS)
def test_bilinear_equals_the_definition(rows, new_rows, align_corners):
    x = images(2, rows, 5, 3)
    size = (new_rows, 11)
    resize = jax.jit(resize_bilinear, static_argnames=("size", "align_corners"))
    out = resize(jnp.array(x), size, align_corners=align_corners)
    expected = bilinear_slowly(x, size, align_corners)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_bilinear_known_rows():
    row = jnp.array([0.0, 10.0, 20.0]).reshape(1, 3, 1)
    aligned = resize_bilinear(row, (1, 5), align_corners=True)
    assert aligned.ravel().tolist() == [0, 5, 10, 15, 20]
    edges = resize_bilinear(row, (1, 6), align_corners=False)
    np.testing.assert_allclose(edges.ravel(), [0, 2.5, 7.5, 12.5, 17.5, 20], rtol=1e-6)
    # No antialiasing: halving four pixels reads between the middle pairs only.
    shrunk = resize_bilinear(jnp.arange(4.0).reshape(1, 4, 1), (1, 2))
    np.testing.assert_allclose(shrunk.ravel(), [0.5, 2.5])


@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_keeps_constants_and_equal_sizes(align_corners):
    constant = resize_bilinear(
        jnp.full((1, 3, 4, 2), 2.5), (9, 7), align_corners=align_corners
    )
    np.testing.assert_array_equal(constant, np.full((1, 9, 7, 2), 2.5))
    x = jnp.array(images(1, 6, 5, 2))
    same = resize_bilinear(x, (6, 5), align_corners=align_corners)
    np.testing.assert_array_equal(same, x)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("rows, new_rows", LENGTHS)
def test_bilinear_gradient_is_the_transpose(rows, new_rows, align_corners):
    # The map is linear: its columns are the images of unit vectors.
    x = jnp.zeros((rows, 1, 1))
    units = np.eye(rows, dtype=np.float32).reshape(rows, rows, 1, 1)
    columns = bilinear_slowly(units, (new_rows, 1), align_corners)[:, :, 0, 0]
    g = images(new_rows, 1, 1)

    def loss(x):
        out = resize_bilinear(x, (new_rows, 1), align_corners=align_corners)
        return jnp.sum(out * g)

    gradient = jax.jit(jax.grad(loss))(x)
    expected = columns @ g[:, 0, 0]
    np.testing.assert_allclose(gradient[:, 0, 0], expected, rtol=1e-4, atol=1e-5)


def test_bilinear_gradient_agrees_with_autodiff_of_a_matrix_form():
    x, g = jnp.array(images(2, 6, 9, 3)), jnp.array(images(2, 13, 4, 3, seed=1))

    def matrix_form(x):
        rows = bilinear_slowly(np.eye(6).reshape(6, 6, 1, 1), (13, 1), True)
        columns = bilinear_slowly(np.eye(9).reshape(9, 9, 1, 1), (4, 1), True)
        rows, columns = rows[:, :, 0, 0].T, columns[:, :, 0, 0].T
        return jnp.einsum("Hh,Ww,bhwc->bHWc", rows, columns, x, precision="highest")

    def ours(x):
        return resize_bilinear(x, (13, 4), align_corners=True)

    expected = jax.vjp(matrix_form, x)[1](g)[0]
    np.testing.assert_allclose(jax.vjp(ours, x)[1](g)[0], expected, atol=2e-5)


def test_bilinear_has_second_derivatives_and_batches():
    x = jnp.array(images(3, 2, 2, 1))

    def cubes(x):
        return jnp.sum(resize_bilinear(x, (3, 3)) ** 3)

    direction = jnp.ones_like(x[0])
    hessian_product = jax.grad(lambda x: jnp.vdot(jax.grad(cubes)(x), direction))
    h = 1e-2
    expected = (
        jax.grad(cubes)(x[0] + h * direction) - jax.grad(cubes)(x[0] - h * direction)
    ) / (2 * h)
    np.testing.assert_allclose(hessian_product(x[0]), expected, rtol=1e-3, atol=1e-3)
    batched = jax.vmap(jax.grad(cubes))(x)
    np.testing.assert_allclose(batched[1], jax.grad(cubes)(x[1]), rtol=1e-6)


def test_bilinear_keeps_the_dtype_and_interpolates_in_float32():
    x = jnp.array(images(1, 4, 4, 2)).astype(jnp.bfloat16)
    out = resize_bilinear(x, (7, 7), align_corners=True)
    exact = resize_bilinear(x.astype(jnp.float32), (7, 7), align_corners=True)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))
    gradient = jax.grad(lambda x: resize_bilinear(x, (7, 7)).astype(float).sum())(x)
    assert gradient.dtype == jnp.bfloat16
    # Weights of an input pixel sum to about 49/16: summed in float32, rounded once.
    np.testing.assert_allclose(gradient.astype(float).sum(), 98, rtol=4e-3)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("resize", [resize_bilinear, resize_nearest])
def test_any_number_of_leading_axes(resize, lead):
    x = jnp.array(images(*lead, 4, 6, 2))
    out = resize(x, (5, 3))
    flat = resize(x.reshape(-1, 4, 6, 2), (5, 3))
    np.testing.assert_array_equal(out, flat.reshape(*lead, 5, 3, 2))


@pytest.mark.parametrize("n, m", [(4, 8), (4, 4), (8, 3), (5, 7), (7, 5), (2, 82)])
def test_nearest_equals_the_definition(n, m):
    x = images(1, n, 3, 2)
    scale = np.float32(n / m)
    rows = [min(int(np.float32(i) * scale), n - 1) for i in range(m)]
    out = resize_nearest(jnp.array(x), (m, 3))
    np.testing.assert_array_equal(out, x[:, rows])


def test_nearest_keeps_masks_and_doubles_pixels():
    mask = jnp.array([[[1], [2]]], jnp.int32)
    out = resize_nearest(mask, (2, 4))
    assert out.dtype == jnp.int32
    assert out[..., 0].tolist() == [[1, 1, 2, 2]] * 2
    assert resize_nearest(mask > 1, (1, 1)).tolist() == [[[False]]]


def test_nearest_gradient_counts_the_copies():
    x = jnp.array(images(1, 2, 3, 1)).astype(jnp.bfloat16)
    gradient = jax.grad(lambda x: resize_nearest(x, (3, 6)).astype(float).sum())(x)
    # Rows 0, 0, 1 and columns 0, 0, 1, 1, 2, 2 are read.
    assert gradient[0, :, :, 0].tolist() == [[4, 4, 4], [2, 2, 2]]


@pytest.mark.parametrize("align_corners", [False, True])
def test_the_backward_pass_scatters_nothing(align_corners):
    def loss(x):
        up = resize_bilinear(x, (16, 16), align_corners=align_corners)
        return jnp.sum(up**2) + jnp.sum(resize_nearest(x, (16, 16)) ** 2)

    x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(loss))(x))


def test_eight_devices_equal_one_and_exchange_nothing():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch = jax.NamedSharding(mesh, jax.P("data"))
    x = jnp.array(images(8, 4, 4, 2))

    def gradient(x):
        return jax.grad(
            lambda x: jnp.sum(resize_bilinear(x, (9, 9), align_corners=True) ** 2)
        )(x)

    step = jax.jit(gradient, in_shardings=over_batch, out_shardings=over_batch)
    np.testing.assert_allclose(step(x), gradient(x), rtol=1e-5, atol=1e-5)
    text = step.lower(x).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize("resize", [resize_bilinear, resize_nearest])
def test_an_empty_size_is_refused(resize):
    with pytest.raises(ValueError, match="size must be two integers above 0, got"):
        resize(jnp.zeros((2, 2, 1)), (0, 4))
    with pytest.raises(ValueError, match="size must be two integers above 0, got"):
        resize(jnp.zeros((2, 2, 1)), (4,))
