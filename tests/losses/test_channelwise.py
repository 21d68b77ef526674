import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxkd import losses


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 2, 3, 4, 5)).astype(np.float32)


def test_cwd_equals_the_sum_over_channels_and_pixels(maps):
    student, teacher = maps
    temperature = 3.0
    expected = np.zeros(2)
    for b in range(2):
        for c in range(5):
            p = scipy.special.softmax(student[b, :, :, c] / temperature)
            q = scipy.special.softmax(teacher[b, :, :, c] / temperature)
            expected[b] += np.sum(q * np.log(q / p))
    expected *= temperature**2 / 5
    value = losses.cwd(jnp.asarray(student), jnp.asarray(teacher), temperature=3.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_cwd_ignores_a_constant_per_channel_but_not_one_per_pixel(maps):
    student, teacher = map(jnp.asarray, maps)
    value = losses.cwd(student, teacher)
    constant = jnp.arange(5.0).reshape(1, 1, 1, 5)
    np.testing.assert_allclose(
        losses.cwd(student + constant, teacher), value, rtol=1e-4, atol=1e-6
    )
    pixel = jnp.arange(12.0).reshape(1, 3, 4, 1)
    assert jnp.all(losses.cwd(student + pixel, teacher) > 2 * value)


def test_cwd_of_an_excluded_class_is_finite(maps):
    excluded = jnp.asarray(maps).at[..., 2].set(-jnp.inf)
    for student, teacher in [excluded, (maps[0], excluded[1])]:
        value, gradient = jax.value_and_grad(
            lambda s, teacher=teacher: losses.cwd(s, teacher).sum()
        )(jnp.asarray(student))
        assert jnp.isfinite(value)
        assert jnp.all(jnp.isfinite(gradient))


def test_cwd_errors_are_one_line(maps):
    student, teacher = map(jnp.asarray, maps)
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        losses.cwd(student, teacher, temperature=0.0)
    with pytest.raises(ValueError, match="teacher logits have 4 classes"):
        losses.cwd(student, teacher[..., :4])
    with pytest.raises(ValueError, match=r"must be \[batch, height, width, channels\]"):
        losses.cwd(student, teacher[0])
