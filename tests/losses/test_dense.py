import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses


def test_region_affinity_by_hand():
    """Two pixels inside, two outside, worked out on paper."""
    mask = jnp.array([[[1, 1], [0, 0]]])
    # Inside sums (3, 0) / 3, outside means (1, 1): cosine 1 / sqrt(2).
    student = jnp.array([[[[1.0, 0.0], [2.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    # Inside (0, 2) / 3, outside (2, 0): cosine 0.
    teacher = jnp.array([[[[0.0, 1.0], [0.0, 1.0]], [[2.0, 0.0], [2.0, 0.0]]]])
    value = losses.region_affinity(student, teacher, mask)
    np.testing.assert_allclose(value, [0.5], rtol=1e-6)


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    student = jnp.asarray(rng.standard_normal((3, 4, 4, 5)), jnp.float32)
    teacher = jnp.asarray(rng.standard_normal((3, 2, 2, 7)), jnp.float32)
    return student, teacher, jnp.asarray(rng.integers(0, 2, (3, 8, 8)))


def test_scale_of_the_features_does_not_matter(features):
    student, teacher, mask = features
    value = losses.region_affinity(student, teacher, mask)
    scaled = losses.region_affinity(3.0 * student, 0.1 * teacher, mask)
    np.testing.assert_allclose(scaled, value, rtol=1e-4)


def test_mask_may_be_boolean_or_hold_other_values(features):
    student, teacher, mask = features
    value = losses.region_affinity(student, teacher, mask)
    for other in (mask == 1, mask * 7, mask.astype(jnp.float32)):
        np.testing.assert_array_equal(
            losses.region_affinity(student, teacher, other), value
        )


def test_mask_is_resized_by_copying_pixels(features):
    student, teacher, mask = features
    repeated = jnp.repeat(jnp.repeat(mask[:, ::2, ::2], 2, axis=1), 2, axis=2)
    fine = losses.region_affinity(student, teacher[:, :, :], repeated)
    coarse = losses.region_affinity(student, teacher, mask[:, ::2, ::2])
    np.testing.assert_allclose(fine, coarse, rtol=1e-5)


@pytest.mark.parametrize("fill", [0, 1])
def test_one_region_only_gives_zero_and_no_gradient(features, fill):
    student, teacher, mask = features
    value, gradient = jax.value_and_grad(
        lambda s: losses.region_affinity(s, teacher, jnp.full_like(mask, fill)).sum()
    )(student)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_batches_must_agree(features):
    student, teacher, mask = features
    with pytest.raises(ValueError, match="foreground has batch size 2"):
        losses.region_affinity(student, teacher, mask[:2])
    with pytest.raises(ValueError, match=r"batch sizes \[3, 1\]"):
        losses.region_affinity(student, teacher[:1], mask)
