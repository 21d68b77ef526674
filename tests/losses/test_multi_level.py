import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from jaxkd import losses


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 5, 4)).astype(np.float32) * 2
    return jnp.asarray(student), jnp.asarray(teacher)


def probabilities(pair, temperature):
    return (softmax(np.float64(x) / temperature, axis=-1) for x in pair)


def test_class_correlation_agrees_with_matrix_products(pair):
    p, q = probabilities(pair, 3.0)
    difference = (p.T @ p - q.T @ q) ** 2
    value = losses.class_correlation(*pair, temperature=3.0)
    np.testing.assert_allclose(value, [difference.sum() / 4] * 5, rtol=1e-4)
    where = np.array([True, False, True, False])
    value = losses.class_correlation(*pair, temperature=3.0, where=jnp.asarray(where))
    np.testing.assert_allclose(value, [difference[:, where].sum() / 4] * 5, rtol=1e-4)


def test_batch_correlation_agrees_with_matrix_products(pair):
    p, q = probabilities(pair, 3.0)
    difference = (p @ p.T - q @ q.T) ** 2
    value = losses.batch_correlation(*pair, temperature=3.0)
    np.testing.assert_allclose(value, difference.sum(1), rtol=1e-4)
    np.testing.assert_allclose(np.mean(value), difference.sum() / 5, rtol=1e-4)
    where = jnp.array([True, False, True, False, True])
    value = losses.batch_correlation(*pair, temperature=3.0, where=where)
    np.testing.assert_allclose(value, difference.sum(1) * np.asarray(where), rtol=1e-4)


def test_low_confidence_keeps_up_to_the_median():
    scale = jnp.array([[3.0], [1.0], [2.0], [5.0], [4.0]])
    logits = scale * jnp.array([[1.0, 0.0]])
    assert losses.low_confidence(logits).tolist() == [True, True, True, False, False]
    assert losses.low_confidence(logits[:4]).tolist() == [False, True, True, False]


def test_low_confidence_classes_are_those_predicted_least(pair):
    summed = softmax(np.float64(pair[1]), axis=-1).sum(0)
    value = losses.low_confidence_classes(pair[1])
    np.testing.assert_array_equal(value, summed <= np.median(summed))
    assert int(value.sum()) == 2


def test_impossible_arguments_are_one_line(pair):
    with pytest.raises(ValueError, match=r"need logits \[batch, classes\], got"):
        losses.class_correlation(pair[0][None], pair[1][None])
    with pytest.raises(ValueError, match=r"where has shape \(5,\); the classes need"):
        losses.class_correlation(*pair, where=jnp.ones(5, bool))
    with pytest.raises(ValueError, match=r"where has shape \(4,\); the examples need"):
        losses.batch_correlation(*pair, where=jnp.ones(4, bool))
    with pytest.raises(ValueError, match="temperature must be > 0"):
        losses.batch_correlation(*pair, temperature=0.0)
