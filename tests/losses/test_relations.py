import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance

from jaxkd import losses

RELATIONS = [
    losses.sp,
    losses.cc_rbf,
    losses.rkd_distance,
    losses.rkd_angle,
    losses.pkt,
]


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.standard_normal((5, 3, 4)), rng.standard_normal((5, 7))


def as_jax(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def rows(x):
    return x.reshape(len(x), -1)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def huber(error):
    error = np.abs(error)
    return np.where(error < 1, 0.5 * error**2, error - 0.5)


def test_sp_is_the_published_sum(pair):
    similar = [unit(rows(x) @ rows(x).T) for x in pair]
    expected = np.sum((similar[0] - similar[1]) ** 2) / 5**2
    np.testing.assert_allclose(losses.sp(*as_jax(*pair)).mean(), expected, rtol=1e-5)


def test_sp_does_not_see_the_scale_of_either_side(pair):
    student, teacher = as_jax(*pair)
    np.testing.assert_allclose(
        losses.sp(3.0 * student, 0.2 * teacher), losses.sp(student, teacher), rtol=1e-4
    )


def test_cc_multiplies_the_errors_of_neighbours():
    student = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    teacher = jnp.array([[0.0, 0.0], [-2.0, 0.0], [1.0, 4.0]])
    # Errors (1, 0), (2, 2), (0, 3): products 2 and 6, scaled so that their mean over
    # three values is the mean over two pairs.
    np.testing.assert_allclose(losses.cc(student, teacher), [3.0, 9.0, 0.0])


def test_cc_trains_both_embeddings(pair):
    student, teacher = as_jax(pair[1], pair[1] + 1.0)
    gradients = jax.grad(lambda s, t: losses.cc(s, t).sum(), (0, 1))(student, teacher)
    np.testing.assert_allclose(gradients[0], -gradients[1])
    assert jnp.all(gradients[1] != 0)


def test_cc_rbf_is_a_taylor_series_of_the_gaussian_kernel(pair):
    gamma = 0.3

    def kernel(x):
        return np.exp(-gamma * scipy.spatial.distance.cdist(x, x, "sqeuclidean"))

    exact = [kernel(unit(rows(x))) for x in pair]
    expected = np.mean((exact[0] - exact[1]) ** 2, axis=1)
    values = losses.cc_rbf(*as_jax(*pair), gamma=gamma, order=12)
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_cc_rbf_stops_at_the_second_order():
    student, teacher = jnp.eye(2), jnp.array([[1.0], [1.0]])
    # Cosines 0 and 1: the series differ by its terms of order one and two.
    difference = math.exp(-0.8) * (0.8 + 0.8**2 / 2)
    np.testing.assert_allclose(
        losses.cc_rbf(student, teacher), [difference**2 / 2] * 2, rtol=1e-6
    )


def test_rkd_distance_is_huber_of_distances_over_their_mean(pair):
    relative = []
    for x in pair:
        distances = scipy.spatial.distance.pdist(rows(x))
        relative.append(scipy.spatial.distance.squareform(distances / distances.mean()))
    expected = huber(relative[0] - relative[1]).mean(axis=1)
    np.testing.assert_allclose(
        losses.rkd_distance(*as_jax(*pair)), expected, rtol=1e-4, atol=1e-7
    )


def test_rkd_angle_is_huber_of_cosines_at_each_anchor(pair):
    def cosine(x, i, j, k):
        first, second = x[j] - x[i], x[k] - x[i]
        length = np.linalg.norm(first) * np.linalg.norm(second)
        return first @ second / length if length else 0.0

    student, teacher = map(rows, pair)
    expected = np.zeros(5)
    for i, j, k in itertools.product(range(5), repeat=3):
        error = cosine(student, i, j, k) - cosine(teacher, i, j, k)
        expected[i] += huber(error) / 25
    np.testing.assert_allclose(losses.rkd_angle(*as_jax(*pair)), expected, rtol=1e-4)


@pytest.mark.parametrize("loss", [losses.rkd_distance, losses.rkd_angle])
def test_rkd_sees_neither_place_nor_scale(loss, pair):
    student, teacher = as_jax(*pair)
    expected = loss(student, teacher)
    np.testing.assert_allclose(loss(2.0 * student + 5.0, teacher), expected, rtol=1e-3)


def test_pkt_is_the_mean_of_a_divergence(pair):
    probabilities = []
    for x in pair:
        similar = (unit(rows(x)) @ unit(rows(x)).T + 1) / 2
        probabilities.append(similar / similar.sum(axis=1, keepdims=True))
    p, q = probabilities
    expected = np.mean(q * np.log((q + 1e-7) / (p + 1e-7)), axis=1)
    np.testing.assert_allclose(
        losses.pkt(*as_jax(*pair)), expected, rtol=1e-4, atol=1e-7
    )


def test_pkt_of_equal_sides_vanishes(pair):
    student, _ = as_jax(*pair)
    value, gradient = jax.value_and_grad(lambda s: losses.pkt(s, student).sum())(
        student
    )
    # Of the order of float32 rounding of a logarithm.
    np.testing.assert_allclose(value, 0, atol=5e-8)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_pkt_survives_opposed_vectors():
    rng = np.random.default_rng(1)
    direction = rng.standard_normal((1, 50))
    student = jnp.asarray(np.concatenate([direction * s for s in (3, -7, 2.1, -0.3)]))
    teacher = jnp.asarray(rng.standard_normal((4, 5)))

    def total(student):
        return losses.pkt(student, teacher).sum()

    value, gradient = jax.value_and_grad(total)(student.astype(jnp.float32))
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("loss", [*RELATIONS, losses.cc])
def test_a_batch_of_one_has_no_relations(loss):
    def total(student):
        return loss(student, jnp.zeros((1, 3))).sum()

    value, gradient = jax.value_and_grad(total)(jnp.array([[1.0, -2.0, 0.0]]))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("loss", RELATIONS)
@pytest.mark.parametrize("number", [0.0, 2.5])
def test_equal_examples_give_finite_gradients(loss, number, pair):
    """Every distance is zero, and with zeros every norm as well."""
    _, teacher = as_jax(*pair)
    student = jnp.full((5, 3), number).at[0].set(1.0)
    for x in (student, jnp.full((5, 3), number)):
        value, gradient = jax.value_and_grad(lambda s: loss(s, teacher).sum())(x)
        assert jnp.isfinite(value)
        assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("loss", RELATIONS)
def test_other_batches_are_an_error(loss):
    with pytest.raises(ValueError, match=r"one batch size, got student \(3, 2\)"):
        loss(jnp.zeros((3, 2)), jnp.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"must be \[batch, ...\]"):
        loss(jnp.zeros(3), jnp.zeros((3, 2)))


def test_cc_needs_one_width():
    with pytest.raises(ValueError, match=r"one shape, got student \(3, 2\)"):
        losses.cc(jnp.zeros((3, 2)), jnp.zeros((3, 4)))


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (losses.cc_rbf, {"gamma": 0.0}, "gamma must be > 0"),
        (losses.cc_rbf, {"order": 0}, "order must be > 0"),
        (losses.rkd_distance, {"eps": 0.0}, "eps must be > 0"),
        (losses.pkt, {"eps": -1.0}, "eps must be > 0"),
    ],
)
def test_impossible_options_are_errors(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(jnp.ones((3, 2)), jnp.ones((3, 2)), **options)
