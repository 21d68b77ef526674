import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.distill.class_queues import (
    enqueue,
    make_queue,
    pixel_items,
    region_items,
    sample_queue,
)

# Two images of six pixels, three classes; 9 is a label to ignore.
LABELS = jnp.array([[0, 0, 2, 2, 2, 9], [0, 1, 1, 9, 9, 9]], jnp.int32)


@pytest.fixture
def features():
    x = np.random.default_rng(0).standard_normal((2, 6, 4))
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


def test_enqueue_stores_what_is_present_in_order_and_wraps():
    queue = make_queue(jax.random.key(0), 2, 3, 1)
    items = jnp.arange(6.0).reshape(2, 3, 1)
    present = jnp.array([[True, False, True], [False, False, True]])
    once = jax.jit(enqueue)(queue, items, present)
    np.testing.assert_array_equal(once["entries"][0, :2, 0], [0, 2])
    assert once["entries"][1, 0, 0] == 5
    np.testing.assert_array_equal(once["next"], [2, 1])
    np.testing.assert_array_equal(once["entries"][1, 1:], queue["entries"][1, 1:])
    twice = enqueue(once, 10 + items, present)
    np.testing.assert_array_equal(twice["entries"][0, :, 0], [12, 2, 10])
    np.testing.assert_array_equal(twice["next"], [1, 2])


def test_enqueue_refuses_more_than_a_queue_holds():
    queue = make_queue(jax.random.key(0), 2, 3, 1)
    with pytest.raises(ValueError, match="4 new entries per class do not fit queues"):
        enqueue(queue, jnp.zeros((2, 4, 1)), jnp.ones((2, 4), bool))


def test_a_new_queue_holds_unit_vectors():
    queue = make_queue(jax.random.key(0), 2, 3, 5)
    norms = jnp.linalg.norm(queue["entries"], axis=-1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)


def test_samples_come_from_the_same_places_of_all_classes():
    queue = make_queue(jax.random.key(0), 2, 10, 1)
    places = jnp.broadcast_to(jnp.arange(10.0)[None, :, None], (2, 10, 1))
    queue["entries"] = places + 100 * jnp.arange(2.0).reshape(2, 1, 1)
    sample = sample_queue(queue, jax.random.key(1), 4).reshape(2, 4)
    np.testing.assert_array_equal(sample[1], sample[0] + 100)
    assert len(set(sample[0].tolist())) == 4


def test_region_items_are_directions_of_the_class_means(features):
    items, present = region_items(features, LABELS, 3)
    np.testing.assert_array_equal(present, [[1, 1], [0, 1], [1, 0]])
    for y, image in [(0, 0), (0, 1), (1, 1), (2, 0)]:
        mean = features[image][LABELS[image] == y].mean(0)
        expected = mean / jnp.linalg.norm(mean)
        np.testing.assert_allclose(items[y, image], expected, rtol=1e-5)


def test_pixel_items_are_distinct_pixels_of_the_class(features):
    items, present = pixel_items(features, LABELS, jax.random.key(0), 3, 2)
    # Per class: two places of the first image, then two of the second.
    np.testing.assert_array_equal(present, [[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]])
    for y in range(3):
        for i in np.flatnonzero(present[y]):
            image = i // 2
            equal = jnp.all(features[image] == items[y, i][None], axis=-1)
            assert jnp.sum(equal) == 1
            assert LABELS[image, jnp.argmax(equal)] == y
    assert jnp.any(items[2, 0] != items[2, 1])
    picks = {
        float(pixel_items(features, LABELS, jax.random.key(i), 3, 1)[0][2, 0, 0])
        for i in range(12)
    }
    assert len(picks) == 3


def test_images_may_have_fewer_pixels_than_are_asked_for(features):
    items, present = pixel_items(features, LABELS, jax.random.key(0), 3, 16)
    assert items.shape == (3, 12, 4)
    np.testing.assert_array_equal(present.sum(1), [3, 2, 3])
