import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses


def normal(*shape):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def test_semantic_consistency_mean_is_the_published_sum():
    student, teacher = normal(3, 4, 5, 2), normal(3, 4, 5, 2)[::-1]
    distance = np.abs(np.mean(student, (1, 2)) - np.mean(teacher, (1, 2)))
    value = losses.semantic_consistency(student, teacher)
    assert float(jnp.mean(value)) == pytest.approx(float(distance.sum()), rel=1e-5)
    mean = losses.semantic_consistency(student, teacher, reduction="mean")
    np.testing.assert_allclose(mean, distance.mean(-1), rtol=1e-5)


def test_content_consistency_by_hand():
    """Two regions: orthogonal in the student, at 45 degrees in the teacher."""
    student = jnp.array([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 1, 2, 2)
    student = student.repeat(2, axis=1)
    teacher = jnp.array([[1.0, 0.0], [1.0, 1.0]]).reshape(1, 1, 2, 2)
    teacher = teacher.repeat(2, axis=1)
    value = losses.content_consistency(student, teacher, regions=2)
    # Half of the 16 pairs of regions differ, by 1 / sqrt(2).
    np.testing.assert_allclose(value, [8 * 0.5 / 16], rtol=1e-6)


def test_content_consistency_compares_any_sizes_and_channels():
    student, teacher = normal(2, 14, 15, 3), normal(2, 7, 9, 5)
    value = losses.content_consistency(student, teacher)
    assert value.shape == (2,)
    scaled = losses.content_consistency(3.0 * student, 0.1 * teacher)
    np.testing.assert_allclose(scaled, value, rtol=1e-4)


def test_labelled_cross_entropy_mean_is_over_labelled_pixels():
    logits = normal(2, 3, 4, 5)
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 3, 4)))
    labels = labels.at[0, :2].set(255)
    value = losses.labelled_cross_entropy(logits, labels)
    log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
    picked = -np.take_along_axis(log_p, np.asarray(labels % 5)[..., None], -1)[..., 0]
    expected = picked[np.asarray(labels) != 255].mean()
    assert float(jnp.mean(value)) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(value[0, :2], 0)
    other = jnp.where(labels == 255, -1, labels)
    np.testing.assert_array_equal(
        losses.labelled_cross_entropy(logits, other, ignore_index=-1), value
    )


def test_labelled_cross_entropy_without_labels_is_zero():
    logits = normal(2, 3, 4, 5)
    nothing = jnp.full((2, 3, 4), 255)
    value, gradient = jax.value_and_grad(
        lambda z: losses.labelled_cross_entropy(z, nothing).sum()
    )(logits)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_errors_name_the_shapes():
    with pytest.raises(ValueError, match="teacher logits have 3 classes"):
        losses.semantic_consistency(normal(2, 3, 3, 4), normal(2, 3, 3, 3))
    with pytest.raises(ValueError, match=r"batch sizes \[2, 1\]"):
        losses.content_consistency(normal(2, 3, 3, 4), normal(1, 3, 3, 4))
    with pytest.raises(ValueError, match="above 0, got 0"):
        losses.content_consistency(normal(1, 3, 3, 4), normal(1, 3, 3, 4), regions=0)
    with pytest.raises(ValueError, match="labels"):
        losses.labelled_cross_entropy(normal(2, 3, 3, 4), jnp.zeros((2, 3, 2), int))
