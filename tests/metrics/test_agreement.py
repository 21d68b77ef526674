import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from jaxkd import metrics


@pytest.fixture
def pair():
    student, teacher = np.random.default_rng(0).normal(0, 3, (2, 6, 7))
    return student.astype(np.float32), teacher.astype(np.float32)


def test_kl_divergence_agrees_with_scipy(pair):
    p, q = (softmax(np.float64(x) / 2.0, axis=-1) for x in pair)
    value = metrics.kl_divergence(*pair, temperature=2.0)
    np.testing.assert_allclose(value, 4.0 * rel_entr(q, p).sum(-1), rtol=1e-12)


def test_distances_by_hand():
    student, teacher = np.array([[3.0, 0.0]]), np.array([[0.0, 4.0]])
    np.testing.assert_allclose(metrics.squared_distance(student, teacher), [25.0])
    np.testing.assert_allclose(metrics.euclidean_distance(student, teacher), [5.0])
    # log(1 + e^-d) on the higher class, d + log(1 + e^-d) on the lower one.
    a, b = np.log1p(np.exp(-3.0)), np.log1p(np.exp(-4.0))
    expected = np.hypot(-a + 4 + b, -3 - a + b)
    value = metrics.log_probability_distance(student, teacher)
    np.testing.assert_allclose(value, [expected])
    np.testing.assert_allclose(metrics.hard_divergence(student, teacher), [3 + a])


def test_equal_logits_are_at_no_distance(pair):
    student = pair[0]
    np.testing.assert_array_equal(metrics.kl_divergence(student, student), 0)
    np.testing.assert_array_equal(metrics.squared_distance(student, student), 0)
    np.testing.assert_allclose(metrics.euclidean_distance(student, student), 1e-6)
    np.testing.assert_array_equal(metrics.top_k_agreement(student, student), 1)


def test_agreement_looks_for_the_teachers_first_class_among_the_students_k():
    student = np.array([[5.0, 4.0, 3.0], [1.0, 1.0, 0.0]])
    teacher = np.array([[0.0, 9.0, 0.0], [0.0, 1.0, 0.0]])
    assert metrics.top_k_agreement(student, teacher).tolist() == [0.0, 0.0]
    assert metrics.top_k_agreement(student, teacher, k=2).tolist() == [1.0, 1.0]


def test_impossible_arguments_are_one_line(pair):
    with pytest.raises(ValueError, match=r"got \(6, 7\) and \(6, 6\)"):
        metrics.squared_distance(pair[0], pair[1][:, 1:])
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        metrics.top_k_agreement(*pair, k=0)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        metrics.kl_divergence(*pair, temperature=0)
