import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxkd import losses


def column(*values):
    """One pixel with these channels."""
    return jnp.array(values).reshape(1, 1, 1, -1)


def maps(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(2 * rng.standard_normal(x), jnp.float32) for x in shapes]


@pytest.mark.parametrize(
    ("student", "teacher", "value"),
    [
        (0.5, 3.0, 0.25),  # active: short of the margin by 1/2
        (1.5, 3.0, 0.0),  # active and beyond it
        (-2.0, 0.1, 9.0),
        (0.5, -3.0, 2.25),  # inactive: too large by 3/2
        (-1.5, -0.1, 0.0),
        (0.0, 0.0, 1.0),  # zero is inactive
    ],
)
def test_boundary_is_a_squared_hinge_on_the_teachers_side(student, teacher, value):
    got = losses.ab(column(student), column(teacher))
    np.testing.assert_allclose(got, [value], rtol=1e-6)


@pytest.mark.parametrize("margin", [0.5, 2.0])
def test_boundary_sums_the_published_terms(margin):
    s, t = maps(0, (2, 3, 2, 4), (2, 3, 2, 4))
    s64, t64 = np.float64(s), np.float64(t)
    terms = (s64 + margin) ** 2 * ((s64 > -margin) & (t64 <= 0))
    terms += (s64 - margin) ** 2 * ((s64 <= margin) & (t64 > 0))
    got = losses.ab(s, t, margin=margin)
    np.testing.assert_allclose(got, terms.sum((1, 2, 3)), rtol=1e-5)


def test_boundary_only_reads_the_teachers_signs():
    s, t = maps(1, (2, 3, 2, 4), (2, 3, 2, 4))
    np.testing.assert_array_equal(losses.ab(s, t), losses.ab(s, 1e3 * t))


def test_boundary_needs_equal_shapes_and_a_margin():
    x = jnp.ones((1, 2, 2, 3))
    with pytest.raises(ValueError, match="one shape, got student .* put a connector"):
        losses.ab(x, jnp.ones((1, 2, 2, 4)))
    with pytest.raises(ValueError, match="margin must be > 0, got 0"):
        losses.ab(x, x, margin=0)


@pytest.mark.parametrize(
    ("student", "teacher", "value"),
    [
        (2.0, 1.0, 1.0),  # positive: copied from above
        (-1.0, 1.0, 4.0),  # and from below
        (0.5, -0.2, 0.49),  # between margin and zero: only from above
        (-0.3, -0.2, 0.0),
        (-0.3, -7.0, 0.04),  # below the margin: the margin is enough
        (-0.6, -7.0, 0.0),
        (0.5, 0.0, 0.25),
    ],
)
def test_partial_distance_by_hand(student, teacher, value):
    got = losses.ofd(column(student), column(teacher), jnp.array([-0.5]))
    np.testing.assert_allclose(got, [value], rtol=1e-5, atol=1e-7)


def test_partial_distance_sums_the_published_terms():
    s, t = maps(2, (2, 3, 2, 4), (2, 3, 2, 4))
    margin = np.array([-0.1, -0.5, -1.0, -3.0])
    s64, t64 = np.float64(s), np.float64(t)
    terms = (s64 - margin) ** 2 * ((s64 > margin) & (t64 <= margin))
    terms += (s64 - t64) ** 2 * ((s64 > t64) & (t64 > margin) & (t64 <= 0))
    terms += (s64 - t64) ** 2 * (t64 > 0)
    got = losses.ofd(s, t, jnp.asarray(margin, jnp.float32))
    np.testing.assert_allclose(got, terms.sum((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("size", [(2, 2), (8, 8), (3, 5)])
def test_the_teacher_is_brought_to_the_students_size(size):
    s, t = maps(3, (2, 4, 4, 3), (2, *size, 3))
    margin = jnp.full(3, -0.5)
    if size == (8, 8):
        resized = t.reshape(2, 4, 2, 4, 2, 3).mean((2, 4))
    elif size == (2, 2):
        resized = jnp.repeat(jnp.repeat(t, 2, axis=1), 2, axis=2)
    else:
        columns = (t[:, :, :-1] + t[:, :, 1:]) / 2  # five columns in four cells
        rows = [columns[:, :1], columns[:, :2].mean(1, keepdims=True)]
        rows += [columns[:, 1:].mean(1, keepdims=True), columns[:, 2:]]
        resized = jnp.concatenate(rows, axis=1)
    np.testing.assert_allclose(
        losses.ofd(s, t, margin), losses.ofd(s, resized, margin), rtol=1e-5
    )


def test_partial_distance_needs_a_margin_for_each_channel():
    x = jnp.ones((1, 2, 2, 3))
    with pytest.raises(ValueError, match=r"one margin for each; .* margin \(2,\)"):
        losses.ofd(x, x, jnp.zeros(2))
    with pytest.raises(ValueError, match="equal channels"):
        losses.ofd(x, jnp.ones((1, 2, 2, 4)), jnp.zeros(3))


def test_margin_is_the_mean_of_the_negative_half_of_a_normal():
    scale = np.array([1.0, -1.0, 0.5, 2.0, 0.4])
    bias = np.array([0.0, 0.3, -0.7, 1.5, 1.0])
    expected = [
        scipy.stats.truncnorm.mean(-np.inf, -b / abs(s), loc=b, scale=abs(s))
        for s, b in zip(scale, bias, strict=True)
    ]
    got = losses.ofd_margin(
        jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_margin_of_channels_that_are_hardly_ever_negative_is_three_deviations():
    # The probability is 0.001 at a ratio of 3.0902.
    scale, bias = jnp.array([0.5, -0.5, 0.5]), jnp.array([1.55, 5.0, 1.54])
    got = losses.ofd_margin(scale, bias)
    np.testing.assert_allclose(got[:2], -1.5, rtol=1e-6)
    tail = scipy.stats.truncnorm.mean(-np.inf, -3.08, loc=1.54, scale=0.5)
    np.testing.assert_allclose(got[2], tail, rtol=1e-3)


def test_margin_of_a_channel_without_deviation_is_finite():
    margin = losses.ofd_margin(jnp.zeros(3), jnp.array([-2.0, 0.0, 2.0]))
    np.testing.assert_allclose(margin, [-2.0, 0.0, 0.0], atol=1e-11)


def test_no_gradient_reaches_the_margin():
    x, y = maps(4, (1, 2, 2, 3), (1, 2, 2, 3))
    gradient = jax.grad(lambda m: losses.ofd(x, y, m)[0])(jnp.full(3, -0.5))
    np.testing.assert_array_equal(gradient, 0)


def test_margin_needs_two_vectors():
    with pytest.raises(ValueError, match="vectors of one length"):
        losses.ofd_margin(jnp.ones(2), jnp.ones(3))
