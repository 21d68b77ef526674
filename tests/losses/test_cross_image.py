import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxkd import losses


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def divergence(student, teacher):
    p = scipy.special.log_softmax(student, axis=-1)
    q = scipy.special.log_softmax(teacher, axis=-1)
    return np.sum(np.exp(q) * (q - p), axis=-1)


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, 2, 4, 5)), rng.standard_normal((3, 2, 4, 6))


@pytest.fixture
def bank():
    return unit(np.random.default_rng(1).standard_normal((9, 5)))


def as_arrays(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def test_minibatch_equals_a_loop_over_pairs_of_images(features):
    student, teacher = (unit(x).reshape(3, 8, -1) for x in features)
    temperature, expected = 0.2, np.zeros(3)
    for i in range(3):
        for j in range(3):
            rows = divergence(
                student[i] @ student[j].T / temperature,
                teacher[i] @ teacher[j].T / temperature,
            )
            expected[i] += rows.mean() / 3
    value = losses.cirkd_minibatch(*as_arrays(*features), temperature=temperature)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_minibatch_of_one_image_compares_it_with_itself(features):
    student, teacher = as_arrays(*features)
    assert losses.cirkd_minibatch(student[:1], teacher[:1])[0] > 0


def test_minibatch_gradient_reaches_the_other_images(features):
    student, teacher = as_arrays(*features)
    gradient = jax.grad(lambda s: losses.cirkd_minibatch(s, teacher)[0])(student)
    assert jnp.all(jnp.any(gradient != 0, axis=(1, 2, 3)))


def test_memory_equals_the_formula(features, bank):
    student, teacher = features[0], features[0][::-1]
    sharp, soft = 0.5, 2.0
    expected = soft**2 * divergence(
        unit(student) @ bank.T / sharp / soft, unit(teacher) @ bank.T / sharp / soft
    )
    value = losses.cirkd_memory(
        *as_arrays(student, teacher, bank), contrast_temperature=sharp, temperature=soft
    )
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


def test_memory_sends_no_gradient_to_the_bank(features, bank):
    student, teacher, bank = as_arrays(features[0], features[0][::-1], bank)
    gradient = jax.grad(lambda x: losses.cirkd_memory(student, teacher, x).sum())(bank)
    np.testing.assert_array_equal(gradient, 0)


def test_errors_name_the_shapes(features, bank):
    student, teacher, bank = as_arrays(*features, bank)
    with pytest.raises(ValueError, match="temperature must be > 0, got -1"):
        losses.cirkd_minibatch(student, teacher, temperature=-1)
    with pytest.raises(ValueError, match=r"size \(2, 4\) and teacher .* \(1, 4\)"):
        losses.cirkd_minibatch(student, teacher[:, :1])
    with pytest.raises(ValueError, match=r"bank \(9, 5\) must agree"):
        losses.cirkd_memory(student, teacher, bank)
    with pytest.raises(ValueError, match=r"bank \(9, 4\) must agree"):
        losses.cirkd_memory(student, student, bank[:, :4])
    with pytest.raises(ValueError, match="contrast_temperature must be > 0"):
        losses.cirkd_memory(student, student, bank, contrast_temperature=0.0)
    with pytest.raises(ValueError, match=r"where has shape \(3, 2, 2\)"):
        where = jnp.ones((3, 2, 2), bool)
        losses.cirkd_memory(student, student, bank, where=where)
