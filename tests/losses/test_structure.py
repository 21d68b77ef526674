import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses
from jaxkd.losses.structure import region_grid


def normal(*shape):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def test_skd_pixel_mean_is_the_published_sum():
    student, teacher = normal(3, 2, 4, 5), normal(3, 2, 4, 5)[::-1]
    q = np.asarray(jax.nn.softmax(teacher, axis=-1), np.float64)
    log_p = np.asarray(jax.nn.log_softmax(student, axis=-1), np.float64)
    published = -np.sum(q * log_p) / (2 * 4)
    value = losses.skd_pixel(student, teacher)
    assert float(jnp.mean(value)) == pytest.approx(published, rel=1e-5)
    mean = losses.skd_pixel(student, teacher, reduction="mean")
    np.testing.assert_allclose(3 * mean, value, rtol=1e-6)


def reference_pair(student, teacher, scale):
    """Image by image and window by window, in float64."""
    total = 0.0
    for images in zip(student, teacher, strict=True):
        grams = []
        for x in images:
            tall, wide = int(scale * x.shape[0]), int(scale * x.shape[1])
            regions = [
                x[i : i + tall, j : j + wide].max(axis=(0, 1))
                for i in range(0, x.shape[0], tall)
                for j in range(0, x.shape[1], wide)
            ]
            unit = [r / (np.linalg.norm(r) + 1e-8) for r in regions]
            grams.append(np.array([[a @ b for a in unit] for b in unit]))
        total += np.sum((grams[0] - grams[1]) ** 2) / grams[0].size
    return total / len(student)


@pytest.mark.parametrize(
    ("size", "scale"), [((4, 4), 0.5), ((5, 9), 0.5), ((6, 7), 0.34), ((3, 3), 1.0)]
)
def test_skd_pair_equals_a_slow_reference(size, scale):
    student, teacher = normal(2, *size, 3), normal(2, *size, 6)
    value = losses.skd_pair(student, teacher, scale=scale)
    expected = reference_pair(
        np.asarray(student, np.float64), np.asarray(teacher, np.float64), scale
    )
    np.testing.assert_allclose(jnp.mean(value), expected, rtol=1e-5, atol=1e-12)


def test_skd_pair_compares_maps_of_other_sizes_with_as_many_regions():
    value = losses.skd_pair(normal(2, 8, 8, 3), normal(2, 4, 6, 3))
    assert value.shape == (2,)
    with pytest.raises(ValueError, match="different numbers of regions at scale 0.5"):
        losses.skd_pair(normal(2, 8, 8, 3), normal(2, 5, 4, 3))


def test_skd_pair_holds_the_norm_constant():
    """Were the norm differentiated, features would get no gradient along themselves."""
    student, teacher = normal(1, 2, 2, 3), normal(1, 2, 2, 4)
    gradient = jax.grad(lambda s: losses.skd_pair(s, teacher).sum())(student)
    along = jnp.sum(gradient * student, axis=-1)
    assert jnp.all(jnp.abs(along) > 1e-3)


def test_skd_pair_gives_ties_to_the_first_pixel_of_a_window():
    student = normal(1, 1, 1, 3).repeat(4, axis=1).repeat(4, axis=2)
    student = student.at[:, :2].multiply(-1.0)
    teacher = normal(1, 4, 4, 3)
    gradient = jax.grad(lambda s: losses.skd_pair(s, teacher).sum())(student)
    chosen = jnp.any(gradient != 0, axis=-1)[0]
    expected = np.zeros((4, 4), bool)
    expected[::2, ::2] = True
    np.testing.assert_array_equal(chosen, expected)


def test_region_grid_counts_windows_that_are_cut_off():
    assert region_grid((8, 8), 0.5) == (2, 2)
    assert region_grid((9, 10), 0.5) == (3, 2)
    with pytest.raises(ValueError, match="maps of 1x8 have no regions at scale 0.5"):
        region_grid((1, 8), 0.5)
    with pytest.raises(ValueError, match="scale must be above 0 and at most 1, got 2"):
        region_grid((8, 8), 2.0)
