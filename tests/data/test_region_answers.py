"""What a teacher says of random crops: drawn by record, asked in any batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxkd import data
from jaxkd.data.arrays import ArraySource
from jaxkd.data.region_answers import draw_regions, region_probabilities
from jaxkd.training.sharding import make_mesh

CLASSES, RECORDS, REGIONS = 4, 5, 6
FORMAT = "marginal_smoothing_k2"


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    return ArraySource(
        "small",
        rng.integers(0, 256, (RECORDS, 12, 10, 3)).astype(np.uint8),
        rng.integers(0, CLASSES, RECORDS),
        class_names=[str(i) for i in range(CLASSES)],
    )


def predict(images):
    """A teacher that looks at colours and at left and right."""
    x = images.astype(jnp.float32) / 64
    left, right = x[:, :, :4].mean((1, 2)), x[:, :, 4:].mean((1, 2))
    return jnp.concatenate([left, right[:, :1] - left[:, 1:2]], axis=-1)


def store(source, **options):
    options = {
        "regions": REGIONS,
        "key": jax.random.key(0),
        "image_size": (8, 8),
        "label_format": FORMAT,
        "batch_size": 4,
        **options,
    }
    return data.store_regions(source, predict, **options)


@pytest.fixture(scope="module")
def regions(source):
    return store(source)


def test_stored_labels_are_the_teachers_answers_to_these_crops(source, regions):
    assert regions.coords.shape == (RECORDS, REGIONS, 4)
    assert regions.index.shape == regions.probability.shape == (RECORDS, REGIONS, 2)
    assert 0 < regions.flip.mean() < 1

    @jax.jit
    def answers(image, coords, flip):
        images = jnp.broadcast_to(image, (REGIONS, *image.shape))
        crops = data.crop_and_flip(images, coords, flip, size=(8, 8))
        return jax.nn.softmax(predict(crops))

    for record in range(RECORDS):
        arrays = source[record]["image"], regions.coords[record], regions.flip[record]
        p = np.asarray(answers(*arrays))
        order = np.argsort(-p, axis=-1)[:, :2]
        np.testing.assert_array_equal(regions.index[record], order)
        np.testing.assert_allclose(
            regions.probability[record], np.take_along_axis(p, order, 1), rtol=1e-5
        )


def test_the_size_of_the_teachers_batches_changes_nothing(source, regions):
    other = store(source, batch_size=6)
    np.testing.assert_array_equal(other.coords, regions.coords)
    np.testing.assert_allclose(other.probability, regions.probability, rtol=1e-6)


def test_a_records_crops_depend_on_the_key_and_the_record_alone(source, regions):
    fewer = store(source.select([0, 1]))
    np.testing.assert_array_equal(fewer.coords, regions.coords[:2])
    assert np.any(store(source, key=jax.random.key(1)).coords != regions.coords)
    assert np.unique(regions.coords.reshape(-1, 4), axis=0).shape[0] == 30


def ask(images, coords, flip, *, chunk):
    function = functools.partial(
        region_probabilities, predict, size=(8, 8), chunk=chunk
    )
    return jax.jit(function)(images, coords, flip)


def test_drawing_by_record_is_what_is_stored(source, regions):
    draw = functools.partial(draw_regions, regions=REGIONS, image_shape=(12, 10, 3))
    coords, flip = jax.vmap(draw, (None, 0))(jax.random.key(0), jnp.arange(RECORDS))
    np.testing.assert_allclose(coords, regions.coords, atol=1e-6)
    np.testing.assert_array_equal(flip, regions.flip)


@pytest.mark.parametrize("chunk", [1, 4, 6, 9])
def test_images_and_crops_may_come_in_any_batches(source, regions, chunk):
    images = jnp.asarray(source.take(np.arange(RECORDS))["image"])
    coords, flip = jnp.asarray(regions.coords), jnp.asarray(regions.flip)
    found = np.asarray(ask(images, coords, flip, chunk=chunk))
    assert found.shape == (RECORDS, REGIONS, CLASSES)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    kept = np.take_along_axis(found, regions.index, axis=-1)
    np.testing.assert_allclose(kept, regions.probability, rtol=1e-5)


def test_images_split_over_devices_give_the_same(source, regions):
    rows = np.arange(8) % RECORDS
    split = NamedSharding(make_mesh(), PartitionSpec("data"))
    arrays = source.take(rows)["image"], regions.coords[rows], regions.flip[rows]
    found = ask(*(jax.device_put(a, split) for a in arrays), chunk=4)
    alone = ask(*map(jnp.asarray, arrays), chunk=4)
    np.testing.assert_allclose(found, alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regions": 0}, "regions must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"label_format": "marginal_smoothing_k5"}, "at least 6 classes, got 4"),
    ],
)
def test_storing_checks_before_it_starts(source, options, message):
    with pytest.raises(ValueError, match=message):
        store(source, **options)


def test_a_teacher_of_other_classes_is_an_error(source):
    with pytest.raises(ValueError, match=r"shape \(4, 3\) for 4 crops; small has 4"):
        data.store_regions(
            source,
            lambda images: predict(images)[:, :3],
            regions=4,
            key=jax.random.key(0),
            image_size=(8, 8),
            label_format=FORMAT,
            batch_size=4,
        )
