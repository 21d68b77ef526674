"""RandAugment: operations against Pillow, draws keyed by record, sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import pytest
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxkd.data import randaugment
from jaxkd.data.randaugment import OPERATIONS, rand_augment

HEIGHT, WIDTH = 24, 31
KEY = jax.random.key(3)


@pytest.fixture(params=[1, 3], ids=["grey", "rgb"])
def picture(request):
    """A smooth picture with noise, so that its histogram is uneven."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(30, 180, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH, 1)
    noise = rng.normal(0, 25, (HEIGHT, WIDTH, request.param))
    return np.clip(ramp + noise, 0, 255).astype(np.uint8)


def pillow(picture):
    return PIL.Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)


def pixels(image):
    return np.asarray(image).reshape(HEIGHT, WIDTH, -1)


@functools.cache
def operate(operation):
    number = OPERATIONS.index(operation)
    return jax.jit(
        lambda image, share: randaugment.apply_operation(image, number, share, 0.5)
    )


def ours(operation, picture, share=1.0):
    image = jnp.asarray(picture, jnp.float32) / 255
    return 255 * np.asarray(operate(operation)(image, share))


def test_identity_changes_nothing(picture):
    np.testing.assert_array_equal(np.round(ours("identity", picture)), picture)


def test_equalize_is_that_of_pillow(picture):
    expected = pixels(PIL.ImageOps.equalize(pillow(picture)))
    np.testing.assert_allclose(ours("equalize", picture), expected, atol=1e-3)


def test_equalize_leaves_flat_and_sparse_channels(picture):
    for values in (np.full_like(picture, 7), np.where(picture > 0, 9, 3)):
        values[0, 0] = 3
        expected = pixels(PIL.ImageOps.equalize(pillow(values.astype(np.uint8))))
        np.testing.assert_allclose(ours("equalize", values), expected, atol=1e-3)


def test_autocontrast_is_that_of_pillow(picture):
    expected = pixels(PIL.ImageOps.autocontrast(pillow(picture)))
    # Pillow cuts off to integers.
    error = ours("autocontrast", picture) - expected
    assert error.min() > -0.01 and error.max() < 1.01
    flat = np.full_like(picture, 40)
    np.testing.assert_allclose(ours("autocontrast", flat), 40, atol=1e-3)


@pytest.mark.parametrize("share", [-1.0, 0.3, 1.0])
def test_posterize_is_that_of_pillow(picture, share):
    bits = 8 - round(4 * abs(share))
    expected = pixels(PIL.ImageOps.posterize(pillow(picture), bits))
    np.testing.assert_allclose(ours("posterize", picture, share), expected, atol=1e-3)


@pytest.mark.parametrize("share", [-0.35, 0.0, 1.0])
def test_solarize_is_that_of_pillow(picture, share):
    threshold = 255 * (1 - abs(share))
    expected = pixels(PIL.ImageOps.solarize(pillow(picture), threshold))
    expected = np.where(picture == 255, 255 * (share == 0), expected)
    got = ours("solarize", picture, share)
    np.testing.assert_allclose(got[picture < 255], expected[picture < 255], atol=1e-3)


@pytest.mark.parametrize("share", [-1.0, -0.4, 0.6, 1.0])
@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
def test_blends_are_those_of_pillow(picture, name, share):
    enhance = getattr(PIL.ImageEnhance, name.title())
    expected = pixels(enhance(pillow(picture)).enhance(1 + 0.9 * share))
    # Pillow rounds the base of the blend and cuts off the result.
    np.testing.assert_allclose(ours(name, picture, share), expected, atol=2.0)


GEOMETRY = {
    "rotate": None,
    "shear_x": lambda s: (1, 0.3 * s, 0, 0, 1, 0),
    "shear_y": lambda s: (1, 0, 0, 0.3 * s, 1, 0),
    "translate_x": lambda s: (1, 0, s * 150 / 331 * WIDTH, 0, 1, 0),
    "translate_y": lambda s: (1, 0, 0, 0, 1, s * 150 / 331 * HEIGHT),
}


@pytest.mark.parametrize("share", [-1.0, 0.37])
@pytest.mark.parametrize("name", GEOMETRY)
def test_movements_are_those_of_pillow(picture, name, share):
    image = pillow(picture)
    grey = (128,) * picture.shape[2] if picture.shape[2] > 1 else 128
    if name == "rotate":
        moved = image.rotate(30 * share, fillcolor=grey)
    else:
        moved = image.transform(
            image.size,
            PIL.Image.Transform.AFFINE,
            GEOMETRY[name](share),
            fillcolor=grey,
        )
    got = np.round(ours(name, picture, share) + 0.01)
    different = np.any(got != pixels(moved), axis=-1)
    # Pillow computes positions in 16 bits; a few fall on the other side of a border.
    assert different.mean() < 0.01
    assert np.any(got != picture)


def batch(count=6, channels=3):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.random((count, 12, 12, channels)), jnp.float32)


@functools.cache
def jitted(**options):
    return jax.jit(functools.partial(rand_augment, **options))


def augment(images, *, epoch=0, index=None, key=KEY, **options):
    index = jnp.arange(len(images)) if index is None else index
    return jitted(**options)(images, key=key, epoch=jnp.int32(epoch), index=index)


def test_images_keep_their_range_and_change():
    images = batch(32)
    output = augment(images)
    assert output.shape == images.shape and output.dtype == jnp.float32
    assert output.min() >= 0 and output.max() <= 1
    changed = jnp.any(output != images, axis=(1, 2, 3))
    assert changed.mean() > 0.8


def test_no_magnitude_leaves_only_operations_without_strength():
    """Of one operation per image, only autocontrast and equalize still act."""
    images = batch(200)
    output = augment(images, num_ops=1, magnitude=0.0)
    changed = np.abs(np.asarray(output - images)).max(axis=(1, 2, 3)) > 0.5 / 255 + 1e-6
    # 144 pixels are too few for equalize.
    share = changed.mean()
    assert share < 0.2
    assert share > 0.01


def test_each_record_draws_by_its_index_and_epoch():
    images = jnp.broadcast_to(batch(1), (6, 12, 12, 3))
    order = jnp.array([3, 1, 5, 0, 2, 4])
    output = augment(images)
    np.testing.assert_allclose(augment(images, index=order), output[order], atol=1e-6)
    assert jnp.any(output[0] != output[1])
    assert jnp.any(augment(images, epoch=1) != output)
    assert jnp.any(augment(images, key=jax.random.key(4)) != output)


def test_operations_are_drawn_uniformly(monkeypatch):
    count = 3000

    def number(image, operation, share, fill):
        return jnp.full_like(image, operation) + share

    monkeypatch.setattr(randaugment, "apply_operation", number)
    output = rand_augment(
        jnp.zeros((count, 1, 1, 1)), key=KEY, epoch=0, index=jnp.arange(count),
        num_ops=1, magnitude=2.5,
    )  # fmt: skip
    values = np.asarray(output).ravel()
    assert (
        scipy.stats.chisquare(np.bincount(np.round(values).astype(int))).pvalue > 0.01
    )
    signs = np.sign(values - np.round(values))
    assert abs(signs.mean()) < 0.05


def test_grey_images_are_augmented():
    images = batch(channels=1)
    assert jnp.any(augment(images) != images)


def test_eight_devices_equal_one():
    images, index = batch(16), jnp.arange(16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    got = augment(
        jax.device_put(images, sharding), index=jax.device_put(index, sharding)
    )
    np.testing.assert_allclose(got, augment(images), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ops": 0}, "num_ops must be >= 1, got 0"),
        ({"magnitude": 11.0}, "magnitude must be between 0 and 10, got 11.0"),
    ],
)
def test_impossible_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        rand_augment(batch(), key=KEY, epoch=0, index=jnp.arange(6), **options)


def test_images_of_two_channels_are_an_error():
    with pytest.raises(ValueError, match=r"one channel or three, got shape \(6, 12"):
        rand_augment(batch(channels=2), key=KEY, epoch=0, index=jnp.arange(6))
