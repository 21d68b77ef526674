import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses


def reference(student, teacher, labels, classes):
    """Pixel by pixel, labels at the size of the maps."""

    def cosines(x):
        result = np.ones(labels.shape)
        for b, y in np.ndindex(labels.shape[0], classes):
            members = labels[b] == y
            if members.any():
                centre = x[b][members].sum(0) / (members.sum() + 1e-6)
                norms = np.linalg.norm(x[b], axis=-1) * np.linalg.norm(centre)
                result[b][members] = ((x[b] @ centre) / norms)[members]
        return result

    return (cosines(student) - cosines(teacher)) ** 2


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, 3, 4)).astype(np.int32)
    labels[0, 0, 1] = labels[1, 2, 2] = 255
    student = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    teacher = rng.standard_normal((2, 3, 4, 7)).astype(np.float32)
    return student, teacher, labels


def test_ifvd_equals_a_slow_reference(case):
    value = losses.ifvd(*map(jnp.asarray, case), num_classes=3)
    np.testing.assert_allclose(value, reference(*case, 3), rtol=1e-4, atol=1e-6)
    assert value[0, 0, 1] == pytest.approx(0, abs=1e-12)


def test_ifvd_copies_pixels_of_labels_of_another_size(case):
    student, teacher, labels = map(jnp.asarray, case)
    fine = labels.repeat(2, axis=1).repeat(3, axis=2)
    np.testing.assert_array_equal(
        losses.ifvd(student, teacher, fine, num_classes=3),
        losses.ifvd(student, teacher, labels, num_classes=3),
    )


def test_ifvd_leaves_other_classes_without_centre(case):
    student, teacher, labels = map(jnp.asarray, case)
    value = losses.ifvd(student, teacher, labels, num_classes=2)
    np.testing.assert_allclose(value[labels >= 2], 0, atol=1e-12)
    assert jnp.all(value[labels < 2] > 0)


def test_ifvd_lets_the_centres_carry_gradient(case):
    """A pixel's term moves the other pixels of its class, and only those."""
    student, teacher, labels = map(jnp.asarray, case)
    gradient = jax.grad(
        lambda s: losses.ifvd(s, teacher, labels, num_classes=3)[0, 1, 1]
    )(student)
    touched = jnp.any(gradient != 0, axis=-1)
    np.testing.assert_array_equal(touched[0], labels[0] == labels[0, 1, 1])
    assert not jnp.any(touched[1])


def test_ifvd_does_not_depend_on_the_scale_of_features(case):
    student, teacher, labels = map(jnp.asarray, case)
    value = losses.ifvd(student, teacher, labels, num_classes=3)
    scaled = losses.ifvd(10 * student, 0.1 * teacher, labels, num_classes=3)
    np.testing.assert_allclose(scaled, value, rtol=1e-3, atol=1e-6)


def test_ifvd_needs_maps_of_one_size(case):
    student, teacher, labels = map(jnp.asarray, case)
    with pytest.raises(ValueError, match=r"size \(3, 4\) and teacher features \(2, 4"):
        losses.ifvd(student, teacher[:, :2], labels, num_classes=3)
    with pytest.raises(ValueError, match=r"batch sizes \[2, 2, 1\]"):
        losses.ifvd(student, teacher, labels[:1], num_classes=3)
