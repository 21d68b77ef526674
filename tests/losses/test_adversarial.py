"""MEAL's similarity of outputs and its discriminator."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxkd import losses


@pytest.fixture
def pair():
    student, teacher = np.random.default_rng(0).standard_normal((2, 4, 6))
    return jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)


@pytest.mark.parametrize("kind", ["ce", "l1", "l2", "l1_soft", "l2_soft"])
def test_meal_similarity_by_numpy(pair, kind):
    s, t = (np.float64(x) for x in pair)
    p, q = scipy.special.softmax(s, axis=-1), scipy.special.softmax(t, axis=-1)
    expected = {
        "ce": -(q * np.log(p)).sum(-1),
        "l1": np.abs(s - t).mean(-1),
        "l2": ((s - t) ** 2).mean(-1),
        "l1_soft": np.abs(p - q).mean(-1),
        "l2_soft": ((p - q) ** 2).mean(-1),
    }[kind]
    value = losses.meal_similarity(*pair, kind=kind)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_meal_similarity_l1_has_the_gradient_of_the_sign(pair):
    gradient = jax.grad(lambda s: losses.meal_similarity(s, pair[1], kind="l1").sum())(
        pair[0]
    )
    np.testing.assert_allclose(gradient, np.sign(pair[0] - pair[1]) / 6, rtol=1e-6)


def test_discriminator_loss_by_hand():
    """Rows (student, teacher) with targets (1, 0) and (0, 1)."""
    student, teacher = jnp.array([[2.0, 1.0]]), jnp.array([[0.0, 3.0]])
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    expected = (softplus(-2) + softplus(1) + softplus(0) + softplus(-3)) / 4
    value = losses.discriminator_loss(student, teacher)
    np.testing.assert_allclose(value, [expected], rtol=1e-6)


def test_discriminator_ends_in_a_relu():
    layers = [(jnp.array([[1.0], [1.0]]), jnp.zeros(1))]
    layers.append((jnp.array([[1.0, -1.0]]), jnp.array([0.5, 0.5])))
    x = jnp.array([[1.0, 2.0], [-4.0, 1.0]])
    np.testing.assert_allclose(losses.discriminate(x, layers), [[3.5, 0], [0.5, 0.5]])


def test_dead_outputs_keep_the_loss_at_log_two_without_gradient():
    layers = [(-jnp.ones((2, 2)), -jnp.ones(2))]
    x = jnp.ones((3, 2))

    def loss(layers):
        judged = losses.discriminate(x, layers)
        return losses.discriminator_loss(judged, judged).mean()

    value, gradient = jax.value_and_grad(loss)(layers)
    assert value == pytest.approx(math.log(2))
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(gradient))


def test_reversed_gradient_leaves_the_value():
    x = jnp.array([0.1, -3.0, 1e30])
    np.testing.assert_array_equal(losses.reverse_gradient(x), x)
    gradient = jax.grad(lambda x: jnp.sum(losses.reverse_gradient(x) * 2))(x)
    np.testing.assert_array_equal(gradient, -2)


def test_mistakes_are_one_line(pair):
    with pytest.raises(ValueError, match="ends in two outputs"):
        losses.discriminate(pair[0], [(jnp.ones((6, 3)), jnp.ones(3))])
    with pytest.raises(ValueError, match="ends in two outputs"):
        losses.discriminate(pair[0], [])
    with pytest.raises(ValueError, match=r"shapes \(4, 2\) and \(3, 2\)"):
        losses.discriminator_loss(jnp.ones((4, 2)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="have 2 classes"):
        losses.meal_similarity(pair[0], pair[1][:, :2])
