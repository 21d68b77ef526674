import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from jaxkd import losses


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 6, 4)).astype(np.float32) * 2
    return jnp.asarray(student), jnp.asarray(teacher)


def probabilities(logits, temperature):
    return softmax(np.float64(logits) / temperature, axis=-1).reshape(-1, 4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(6, 4), (1, 2, 3, 4)])
def test_dist_agrees_with_numpys_correlation(pair, temperature, shape):
    p, q = (probabilities(x, temperature) for x in pair)
    inter = np.array([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = np.mean(
        [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)]
    )
    expected = temperature**2 * (2.0 * inter + 3.0 * intra)
    student, teacher = (x.reshape(shape) for x in pair)
    value = losses.dist(student, teacher, beta=2.0, gamma=3.0, temperature=temperature)
    assert value.shape == shape[:-1]
    # The eps in the denominator is what np.corrcoef does not have.
    np.testing.assert_allclose(value.ravel(), expected, rtol=1e-4)


def test_equal_logits_correlate_fully(pair):
    teacher = pair[1]
    # 1e-8 beside the product of two norms, which is at least 1e-3 here.
    np.testing.assert_allclose(losses.dist(teacher, teacher), 0, atol=1e-4)


def test_a_uniform_student_gets_no_gradient_instead_of_a_huge_one(pair):
    uniform = jnp.zeros_like(pair[0])
    value, gradient = jax.value_and_grad(lambda s: losses.dist(s, pair[1]).sum())(
        uniform
    )
    assert value == 2 * len(uniform)
    np.testing.assert_array_equal(gradient, 0)


def test_a_batch_of_one_has_no_intra_class_relation(pair):
    one = pair[0][:1], pair[1][:1]
    value, gradient = jax.value_and_grad(
        lambda s: losses.dist_intra(s, one[1], temperature=2.0).sum()
    )(one[0])
    assert value == 4.0
    np.testing.assert_array_equal(gradient, 0)


def test_classes_masked_in_both_have_no_effect_on_the_gradient_of_others(pair):
    student, teacher = (x.at[:, 1].set(-jnp.inf) for x in pair)
    value, gradient = jax.value_and_grad(lambda s: losses.dist(s, teacher).sum())(
        student
    )
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(gradient))
    np.testing.assert_array_equal(gradient[:, 1], 0)


def test_impossible_arguments_are_one_line(pair):
    with pytest.raises(ValueError, match="temperature must be > 0"):
        losses.dist(*pair, temperature=-1.0)
    with pytest.raises(ValueError, match="have 3 classes and student logits 4"):
        losses.dist_intra(pair[0], pair[1][:, 1:])
