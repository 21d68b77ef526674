import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import entr, log_softmax, rel_entr, softmax

from jaxkd import losses

LABELS = np.array([0, 4, 3, 3, 1, 2])


@pytest.fixture
def student():
    return jnp.asarray(np.random.default_rng(0).normal(0, 2, (6, 5)), jnp.float32)


@pytest.fixture
def teachers():
    values = np.random.default_rng(1).normal(0, 2, (3, 6, 5))
    return [jnp.asarray(x, jnp.float32) for x in values]


def kl(q, student, temperature):
    p = softmax(np.float64(student) / temperature, axis=-1)
    return temperature**2 * rel_entr(q, p).sum(-1)


def each_kl(student, teachers, temperature):
    q = softmax(np.float64(np.stack(teachers)) / temperature, axis=-1)
    return np.stack([kl(x, student, temperature) for x in q])


def test_function_matching_sums_over_teachers(student, teachers):
    value = losses.function_matching(student, teachers, temperature=2.0)
    expected = each_kl(student, teachers, 2.0).sum(0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("shares", [None, (1.0, 0.0, 3.0)])
def test_averages_agree_with_scipy(student, teachers, shares):
    factors = np.ones(3) / 3 if shares is None else np.array([0.25, 0.0, 0.75])
    value = losses.averaged_kd(student, teachers, shares=shares, temperature=2.0)
    expected = factors @ each_kl(student, teachers, 2.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)

    stacked = np.float64(np.stack(teachers))
    q = np.tensordot(factors, softmax(stacked / 2.0, axis=-1), 1)
    teacher = losses.averaged_probabilities(teachers, shares=shares, temperature=2.0)
    np.testing.assert_allclose(softmax(teacher / 2.0, axis=-1), q, rtol=1e-5)

    teacher = losses.averaged_logits(teachers, shares=shares)
    expected = np.tensordot(factors, stacked, 1)
    np.testing.assert_allclose(teacher, expected, rtol=1e-5, atol=1e-6)


def test_averaging_losses_or_probabilities_gives_one_gradient(student, teachers):
    def gradient(loss):
        return jax.grad(lambda s: loss(s).sum())(student)

    mean = losses.averaged_probabilities(teachers, temperature=4.0)
    np.testing.assert_allclose(
        gradient(lambda s: losses.averaged_kd(s, teachers)),
        gradient(lambda s: losses.kd(s, mean)),
        rtol=1e-4,
        atol=1e-6,
    )


def test_ebkd_agrees_with_scipy(student, teachers):
    entropy = entr(softmax(np.float64(np.stack(teachers)), axis=-1)).sum(-1)
    weights = 1 - entropy / entropy.sum(0)
    np.testing.assert_allclose(losses.entropy_weights(teachers), weights, rtol=1e-5)
    value = losses.ebkd(student, teachers, temperature=3.0)
    expected = (weights * each_kl(student, teachers, 3.0)).mean(0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_certain_teachers_share_equally():
    certain = jnp.array([[1e4, -1e4, 0.0]])
    weights = losses.entropy_weights([certain, -certain])
    np.testing.assert_array_equal(weights, 0.5)


def test_camkd_agrees_with_scipy(student, teachers):
    log_q = log_softmax(np.float64(np.stack(teachers)), axis=-1)
    error = -log_q[:, np.arange(6), LABELS]
    weights = (1 - softmax(error, axis=0)) / 2
    labels = jnp.asarray(LABELS)
    value = losses.confidence_weights(teachers, labels)
    np.testing.assert_allclose(value, weights, rtol=1e-5)
    np.testing.assert_allclose(np.sum(value, 0), 1, rtol=1e-5)
    value = losses.camkd(student, teachers, labels, temperature=3.0)
    expected = (weights * each_kl(student, teachers, 3.0)).mean(0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_confidence_weights_take_label_vectors(teachers):
    vectors = jnp.eye(5)[LABELS]
    np.testing.assert_allclose(
        losses.confidence_weights(teachers, vectors),
        losses.confidence_weights(teachers, jnp.asarray(LABELS)),
        rtol=1e-5,
    )


def test_weighted_hint_by_hand():
    students = [jnp.full((2, 1, 2, 3), 2.0), jnp.full((2, 2, 2, 1), 1.0)]
    teachers = [jnp.zeros((2, 1, 2, 3)), jnp.full((2, 2, 2, 1), 4.0)]
    weights = jnp.array([[1.0, 0.5], [0.0, 0.5]])
    value = losses.weighted_hint(students, teachers, weights)
    # Squared differences 4 and 9, and a further half for two teachers.
    np.testing.assert_array_equal(value, [2.0, 3.25])


def test_a_class_masked_by_minus_infinity_stays_finite(student, teachers):
    masked = [t.at[:, 2].set(-jnp.inf) for t in teachers]
    labels = jnp.asarray(np.where(LABELS == 2, 0, LABELS))
    for loss in (
        lambda s: losses.camkd(s, masked, labels),
        lambda s: losses.ebkd(s, masked),
        lambda s: losses.function_matching(s, masked),
        lambda s: losses.kd(s, losses.averaged_logits(masked)),
        lambda s: losses.kd(s, losses.averaged_probabilities(masked)),
    ):
        for z in (student, student.at[:, 2].set(-jnp.inf)):
            values, back = jax.vjp(loss, z)
            assert jnp.all(jnp.isfinite(values))
            assert jnp.all(jnp.isfinite(back(jnp.ones_like(values))[0]))


def test_impossible_arguments_are_one_line(student, teachers):
    labels = jnp.asarray(LABELS)
    with pytest.raises(ValueError, match="at least 2 teachers, got 1"):
        losses.camkd(student, teachers[:1], labels)
    with pytest.raises(ValueError, match="at least 1 teacher, got 0"):
        losses.function_matching(student, [])
    with pytest.raises(ValueError, match="got 2 shares for 3 teachers"):
        losses.averaged_kd(student, teachers, shares=[1, 2])
    with pytest.raises(ValueError, match="must be finite and >= 0, and one above 0"):
        losses.averaged_logits(teachers, shares=[0, 0, 0])
    with pytest.raises(ValueError, match=r"have shapes \[\(6, 5\), \(5, 5\)\]"):
        losses.averaged_logits([teachers[0], teachers[1][1:]])
    with pytest.raises(ValueError, match=r"weights have shape \(2, 6\); 3 teachers"):
        losses.weighted_hint(teachers, teachers, jnp.ones((2, 6)))
    with pytest.raises(ValueError, match="student features"):
        losses.weighted_hint(teachers[:2], teachers, jnp.ones((3, 6)))
