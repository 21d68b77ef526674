"""Random boxes, and what is cut out of an image by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import data
from jaxkd.numerics import resize_bilinear

# Compiled whole, these are several times faster here than operation by operation.
crop_and_flip = jax.jit(data.crop_and_flip, static_argnames="size")
draw_crops = jax.jit(
    data.draw_crops,
    static_argnums=(1, 2),
    static_argnames=("scale", "ratio", "aspect"),
)


@pytest.mark.parametrize("aspect", [0.5, 1.0])
def test_boxes_lie_inside_and_have_the_areas_and_shapes_asked_for(aspect):
    boxes = draw_crops(
        jax.random.key(0), 40, 50, scale=(0.1, 0.6), ratio=(0.7, 1.5), aspect=aspect
    )
    assert boxes.shape == (40, 50, 4) and boxes.dtype == jnp.float32
    top, left, height, width = np.moveaxis(np.float64(boxes), -1, 0)
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 1 + 1e-6).all() and (left + width <= 1 + 1e-6).all()
    area, ratio = height * width, width * aspect / height
    assert area.min() >= 0.1 - 1e-6 and area.max() <= 0.6 + 1e-6
    assert ratio.min() >= 0.7 - 1e-5 and ratio.max() <= 1.5 + 1e-5
    # Small boxes always fit, so their areas are uniform.
    assert np.abs(np.mean(area < 0.2) / np.mean(area < 0.3) - 0.5) < 0.06


def test_positions_and_shapes_are_spread():
    top, left, height, width = np.moveaxis(
        np.asarray(draw_crops(jax.random.key(1), 1, 2000, scale=(0.1, 0.2)))[0], -1, 0
    )
    for place, size in ((top, height), (left, width)):
        share = place / (1 - size)
        assert abs(share.mean() - 0.5) < 0.03 and share.std() > 0.27
    log_ratio = np.log(width / height)
    assert abs(log_ratio.mean()) < 0.03
    assert abs(log_ratio.std() - np.log(4 / 3) / np.sqrt(3)) < 0.02


@pytest.mark.parametrize(
    ("aspect", "expected"),
    [(4.0, [0, 1 / 3, 1, 1 / 3]), (0.25, [1 / 3, 0, 1 / 3, 1])],
)
def test_what_never_fits_is_the_largest_central_box(aspect, expected):
    boxes = draw_crops(
        jax.random.key(0), 1, 3, scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3), aspect=aspect
    )
    np.testing.assert_allclose(boxes, [[expected] * 3], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.0, 0.5)}, "scale must be increasing"),
        ({"scale": (0.5, 0.4)}, "scale must be increasing"),
        ({"ratio": (0.0, 1.0)}, "ratio must be increasing"),
        ({"aspect": 0.0}, "aspect above 0"),
    ],
)
def test_impossible_ranges_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        draw_crops(jax.random.key(0), 1, 1, **options)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((2, 10, 8, 3)), jnp.float32)


BOXES = jnp.array([[0.25, 0.2, 0.5, 0.7], [0.0, 0.5, 0.95, 0.5]])


def cut_and_resize(images, size):
    """The same by slices: fractions times size, truncated."""
    parts = [images[:1, 2:7, 1:6], images[1:, 0:9, 4:8]]
    return jnp.concatenate(
        jax.jit(lambda parts: [resize_bilinear(part, size) for part in parts])(parts)
    )


@pytest.mark.parametrize("size", [(5, 5), (3, 7), (12, 4), (1, 1)])
def test_a_crop_is_a_slice_resized(images, size):
    got = crop_and_flip(images, BOXES, jnp.zeros(2, bool), size=size)
    np.testing.assert_allclose(got, cut_and_resize(images, size), atol=1e-5)


def test_a_flip_mirrors_left_and_right(images):
    got = crop_and_flip(images, BOXES, jnp.array([True, False]), size=(4, 6))
    expected = cut_and_resize(images, (4, 6))
    np.testing.assert_allclose(got[0], expected[0, :, ::-1], atol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)


def test_the_whole_image_at_its_own_size_is_itself(images):
    whole = jnp.array([[0.0, 0.0, 1.0, 1.0]] * 2)
    for x in (images, (images * 40 + 100).astype(jnp.uint8)):
        got = crop_and_flip(x, whole, jnp.zeros(2, bool), size=(10, 8))
        assert got.dtype == x.dtype
        np.testing.assert_array_equal(got, x)


def test_integers_are_rounded_not_cut_off():
    image = jnp.array([0, 255], jnp.uint8).reshape(1, 1, 2, 1)
    whole = jnp.array([[0.0, 0.0, 1.0, 1.0]])
    got = crop_and_flip(image, whole, jnp.zeros(1, bool), size=(1, 4))
    np.testing.assert_array_equal(got[0, 0, :, 0], [0, 64, 191, 255])


def test_a_box_below_a_pixel_is_one_pixel_inside_the_image(images):
    tiny = jnp.array([[0.999, 0.999, 0.001, 0.001], [0.0, 0.0, 0.001, 0.001]])
    got = crop_and_flip(images, tiny, jnp.zeros(2, bool), size=(2, 2))
    for crop, pixel in zip(got, (images[0, -1, -1], images[1, 0, 0]), strict=True):
        np.testing.assert_allclose(crop, jnp.broadcast_to(pixel, crop.shape))


def test_jit_equals_no_jit(images):
    flip = jnp.array([True, False])
    np.testing.assert_allclose(
        crop_and_flip(images, BOXES, flip, size=(4, 4)),
        data.crop_and_flip(images, BOXES, flip, size=(4, 4)),
        atol=1e-6,
    )


def test_an_empty_size_is_an_error(images):
    with pytest.raises(ValueError, match=r"size must be two integers above 0"):
        crop_and_flip(images, BOXES, jnp.zeros(2, bool), size=(0, 4))
