import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from jaxkd import losses

LABELS = np.array([0, 6, 3, 3, 5, 1])


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 6, 7)).astype(np.float32) * 3
    return jnp.asarray(student), jnp.asarray(teacher)


def others(logits, temperature):
    """Softmax over the classes but the target, by deleting it."""
    kept = np.stack(
        [np.delete(z, y) for z, y in zip(np.float64(logits), LABELS, strict=True)]
    )
    return softmax(kept / temperature, axis=-1)


def target_pair(logits, temperature):
    p = softmax(np.float64(logits) / temperature, axis=-1)
    own = p[np.arange(len(p)), LABELS]
    return np.stack([own, 1 - own], axis=-1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_agrees_with_scipy(pair, temperature):
    student, teacher = pair
    square = temperature**2
    target = square * rel_entr(
        target_pair(teacher, temperature), target_pair(student, temperature)
    ).sum(-1)
    nontarget = square * rel_entr(
        others(teacher, temperature), others(student, temperature)
    ).sum(-1)
    value = losses.dkd(
        *pair, jnp.asarray(LABELS), alpha=0.5, beta=3.0, temperature=temperature
    )
    np.testing.assert_allclose(value, 0.5 * target + 3.0 * nontarget, rtol=2e-5)


def test_kd_is_dkd_with_the_weight_that_the_teacher_leaves(pair):
    """KD = TCKD + (1 - q_y) NCKD, from which Zhao et al. start."""
    labels = jnp.asarray(LABELS)
    left = target_pair(pair[1], 4.0)[:, 1]
    value = losses.dkd_target(*pair, labels) + left * losses.dkd_nontarget(
        *pair, labels
    )
    np.testing.assert_allclose(value, losses.kd(*pair), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_nkd_agrees_with_scipy(pair, temperature):
    student, teacher = pair
    p, q = target_pair(student, 1.0)[:, 0], target_pair(teacher, 1.0)[:, 0]
    cross = -(others(teacher, temperature) * np.log(others(student, temperature)))
    expected = -q * np.log(p) + 0.7 * temperature**2 * cross.sum(-1)
    value = losses.nkd(*pair, jnp.asarray(LABELS), gamma=0.7, temperature=temperature)
    np.testing.assert_allclose(value, expected, rtol=2e-5)


@pytest.mark.parametrize("loss", [losses.dkd, losses.nkd])
def test_of_label_vectors_only_the_largest_entry_counts(pair, loss):
    vectors = 0.6 * np.eye(7)[LABELS] + 0.4 * np.eye(7)[(LABELS + 2) % 7]
    value = loss(*pair, jnp.asarray(vectors, jnp.float32))
    np.testing.assert_array_equal(value, loss(*pair, jnp.asarray(LABELS)))


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("loss", [losses.dkd_nontarget, losses.nkd_nontarget])
def test_without_a_choice_of_other_classes_the_nontarget_part_is_zero(loss, classes):
    logits = jnp.arange(3.0 * classes).reshape(3, classes)
    labels = jnp.zeros(3, jnp.int32)
    value, grad = jax.value_and_grad(lambda s: loss(s, -logits, labels).sum())(logits)
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


def test_the_target_part_keeps_what_a_sure_teacher_leaves():
    """1 - p_y of 2e-13 is no float32 difference, but its logarithm is."""
    student, teacher = jnp.array([[30.0, 0.0, 0.0]]), jnp.array([[28.0, 0.0, 0.0]])
    labels = jnp.array([0])
    gradient = jax.grad(
        lambda s: losses.dkd_target(s, teacher, labels, temperature=1.0).sum()
    )
    # d/dz_y = p_y - q_y = (1 - q_y) - (1 - p_y).
    expected = 2 * np.exp(-28.0) - 2 * np.exp(-30.0)
    np.testing.assert_allclose(gradient(student)[0, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("loss", [losses.dkd, losses.nkd])
@pytest.mark.parametrize("masked", ["teacher", "both"])
def test_classes_at_minus_infinity_are_as_if_not_there(pair, loss, masked):
    student, teacher = (x.at[:, 2].set(-jnp.inf) for x in pair)
    student = student if masked == "both" else pair[0]
    labels = jnp.asarray(LABELS)
    value, grad = jax.value_and_grad(lambda s: loss(s, teacher, labels).sum())(student)
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(grad))
    if masked == "both":
        fewer = [jnp.delete(x, 2, axis=1) for x in pair]
        expected = loss(*fewer, jnp.where(labels > 2, labels - 1, labels)).sum()
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_array_equal(grad[:, 2], 0)


@pytest.mark.parametrize("loss", [losses.dkd, losses.nkd])
def test_impossible_arguments_are_one_line(pair, loss):
    labels = jnp.asarray(LABELS)
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        loss(*pair, labels, temperature=0)
    with pytest.raises(ValueError, match="have 6 classes and student logits 7"):
        loss(pair[0], pair[1][:, 1:], labels)
    with pytest.raises(ValueError, match=r"labels have shape \(5,\); .* \(6,\) for"):
        loss(*pair, labels[1:])
    with pytest.raises(ValueError, match=r"where has shape \(5,\)"):
        loss(*pair, labels, where=jnp.ones(5, bool))
