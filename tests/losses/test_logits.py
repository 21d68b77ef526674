import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxkd import losses


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 6, 7)).astype(np.float32) * 3
    return jnp.asarray(student), jnp.asarray(teacher)


def reference_kd(student, teacher, temperature):
    """KL(softmax(t/T) || softmax(s/T)) in float64."""
    p = scipy.special.softmax(np.float64(student) / temperature, axis=-1)
    q = scipy.special.softmax(np.float64(teacher) / temperature, axis=-1)
    return temperature**2 * scipy.special.rel_entr(q, p).sum(-1)


def test_kd_by_hand():
    # q = (3/4, 1/4) and p = (1/2, 1/2) at temperature 2.
    student = jnp.array([[5.0, 5.0]])
    teacher = jnp.array([[2 * math.log(3), 0.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    value = losses.kd(student, teacher, temperature=2.0)
    np.testing.assert_allclose(value, [expected], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kd_agrees_with_scipy(pair, temperature):
    value = losses.kd(*pair, temperature=temperature)
    expected = reference_kd(*pair, temperature)
    # T^2 multiplies the float32 rounding of log-probabilities.
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-7 * temperature**2)


def test_kd_of_maps_is_kd_of_each_pixel(pair):
    student, teacher = (x.reshape(1, 2, 3, 7) for x in pair)
    value = losses.kd(student, teacher)
    assert value.shape == (1, 2, 3)
    np.testing.assert_allclose(value.ravel(), losses.kd(*pair), rtol=1e-6)


def test_kd_is_exactly_zero_for_equal_extreme_logits():
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]])
    np.testing.assert_array_equal(losses.kd(logits, logits), 0)


def test_kd_gradient_at_high_temperature_is_the_difference_of_logits(pair):
    """Hinton et al., section 2.1: (z_s - z_t) / K for zero-mean logits."""
    student, teacher = (x - x.mean(-1, keepdims=True) for x in pair)
    gradient = jax.grad(lambda s: losses.kd(s, teacher, temperature=300.0).sum())
    expected = (student - teacher) / student.shape[-1]
    np.testing.assert_allclose(gradient(student), expected, rtol=0.1, atol=0.02)


def test_cross_entropy_form_exceeds_kd_by_the_teachers_entropy(pair):
    temperature = 3.0
    q = scipy.special.softmax(np.float64(pair[1]) / temperature, axis=-1)
    entropy = temperature**2 * scipy.special.entr(q).sum(-1)
    difference = losses.kd_cross_entropy(*pair, temperature=temperature) - losses.kd(
        *pair, temperature=temperature
    )
    np.testing.assert_allclose(difference, entropy, rtol=1e-5)


def test_cross_entropy_form_has_the_gradient_of_kd(pair):
    student, teacher = pair
    kd = jax.grad(lambda s: losses.kd(s, teacher).sum())(student)
    cross = jax.grad(lambda s: losses.kd_cross_entropy(s, teacher).sum())(student)
    np.testing.assert_allclose(cross, kd, rtol=1e-4, atol=1e-5)


def test_softened_kl_teaches_both_sides(pair):
    """d/dt of sum q (log q - log p) is q (log q/p - KL) at temperature 1."""
    student, teacher = pair
    gradient = jax.grad(lambda t: losses.softened_kl(student, t).sum())(teacher)
    log_p = scipy.special.log_softmax(np.float64(student), axis=-1)
    log_q = scipy.special.log_softmax(np.float64(teacher), axis=-1)
    ratio = log_q - log_p
    divergence = (np.exp(log_q) * ratio).sum(-1, keepdims=True)
    expected = np.exp(log_q) * (ratio - divergence)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [losses.kd, losses.kd_cross_entropy])
def test_masked_classes_are_as_if_not_there(pair, loss):
    kept = np.array([0, 2, 5])
    where = jnp.zeros(pair[0].shape, bool).at[:, kept].set(True)
    value = loss(*pair, where=where)
    expected = loss(*(x[:, kept] for x in pair))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_masked_classes_get_no_gradient_and_may_be_infinite(pair):
    student, teacher = pair
    where = jnp.ones(student.shape, bool).at[:, 3].set(False)
    student, teacher = student.at[:, 3].set(-jnp.inf), teacher.at[:, 3].set(-jnp.inf)
    gradient = jax.grad(lambda s: losses.kd(s, teacher, where=where).sum())(student)
    assert jnp.all(jnp.isfinite(gradient))
    np.testing.assert_array_equal(gradient[:, 3], 0)


@pytest.mark.parametrize("loss", [losses.kd, losses.kd_cross_entropy])
def test_a_single_class_gives_zero(loss):
    value = loss(jnp.array([[3.0], [-2.0]]), jnp.array([[1.0], [0.0]]))
    np.testing.assert_array_equal(value, 0)


def test_temperature_may_be_traced(pair):
    value = jax.jit(lambda t: losses.kd(*pair, temperature=t))(2.0)
    np.testing.assert_allclose(value, losses.kd(*pair, temperature=2.0), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan")])
@pytest.mark.parametrize("loss", [losses.kd, losses.kd_cross_entropy])
def test_temperature_must_be_positive(pair, loss, temperature):
    with pytest.raises(ValueError, match=f"temperature must be > 0, got {temperature}"):
        loss(*pair, temperature=temperature)


@pytest.mark.parametrize("loss", [losses.kd, losses.kd_cross_entropy])
def test_other_classes_are_an_error_that_names_both(loss):
    with pytest.raises(ValueError, match="have 100 classes and student logits 10"):
        loss(jnp.zeros((4, 10)), jnp.zeros((4, 100)))


def test_a_teacher_of_another_batch_is_not_broadcast():
    with pytest.raises(ValueError, match=r"\(4, 10\) and teacher logits \(1, 10\)"):
        losses.kd(jnp.zeros((4, 10)), jnp.zeros((1, 10)))


def test_a_mask_of_another_shape_is_an_error(pair):
    with pytest.raises(ValueError, match=r"need \(6,\) to choose examples"):
        losses.kd(*pair, where=jnp.ones((7,), bool))


def test_logits_without_batch_are_an_error():
    with pytest.raises(ValueError, match=r"got shape \(10,\)"):
        losses.kd(jnp.zeros(10), jnp.zeros(10))


@pytest.mark.parametrize("loss", [losses.kd, losses.kd_cross_entropy])
@pytest.mark.parametrize("both", [True, False])
def test_classes_at_minus_infinity_leave_values_and_gradients_finite(pair, loss, both):
    student, teacher = pair[0], pair[1].at[:, 3].set(-jnp.inf)
    if both:
        student = student.at[:, 3].set(-jnp.inf)
    value, gradient = jax.value_and_grad(lambda s: loss(s, teacher).sum())(student)
    assert jnp.all(jnp.isfinite(gradient))
    p = scipy.special.softmax(np.float64(student) / 4.0, axis=-1)
    q = scipy.special.softmax(np.float64(teacher) / 4.0, axis=-1)
    np.testing.assert_allclose(gradient, 4.0 * (p - q), rtol=1e-4, atol=1e-5)
    assert 0 < value < 1e4


def test_a_nan_among_the_logits_is_not_hidden(pair):
    student = pair[0].at[0, 0].set(jnp.nan)
    assert jnp.isnan(losses.kd(student, pair[1])[0])


def test_wsld_agrees_with_scipy(pair):
    labels = np.array([0, 6, 3, 3, 5, 1])
    rows = np.arange(6)
    behind, level = (
        -scipy.special.log_softmax(np.float64(x), axis=-1)[rows, labels] for x in pair
    )
    weight = 1 - np.exp(-behind / level)
    q = scipy.special.softmax(np.float64(pair[1]) / 2.0, axis=-1)
    log_p = scipy.special.log_softmax(np.float64(pair[0]) / 2.0, axis=-1)
    expected = weight * 4.0 * -(q * log_p).sum(-1)
    value = losses.wsld(*pair, jnp.asarray(labels))
    np.testing.assert_allclose(value, expected, rtol=2e-5)


def test_the_weights_of_wsld_are_constant(pair):
    student, teacher = pair
    labels = jnp.array([0, 6, 3, 3, 5, 1])
    gradient = jax.grad(lambda s: losses.wsld(s, teacher, labels).sum())(student)
    plain = jax.grad(
        lambda s: losses.kd_cross_entropy(s, teacher, temperature=2.0).sum()
    )(student)
    weight = losses.wsld(*pair, labels) / losses.kd_cross_entropy(
        *pair, temperature=2.0
    )
    np.testing.assert_allclose(gradient, weight[:, None] * plain, rtol=1e-4, atol=1e-6)


def test_wsld_of_a_certain_teacher_is_unweighted():
    student, teacher = jnp.array([[0.0, 1.0]]), jnp.array([[1e4, -1e4]])
    value = losses.wsld(student, teacher, jnp.array([0]))
    expected = losses.kd_cross_entropy(student, teacher, temperature=2.0)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_hard_distillation_is_cross_entropy_with_the_teachers_decision(pair):
    decision = jnp.argmax(pair[1], axis=-1)
    value = losses.hard_distillation(*pair)
    np.testing.assert_array_equal(value, losses.cross_entropy(pair[0], decision))


def test_hard_distillation_asks_for_equal_classes():
    with pytest.raises(ValueError, match="have 5 classes and student logits 4"):
        losses.hard_distillation(jnp.zeros((2, 4)), jnp.zeros((2, 5)))
