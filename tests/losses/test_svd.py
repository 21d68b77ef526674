"""KDSVD against a slow version in float64, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses


def maps(seed, *shapes):
    """Random maps whose singular values are well apart, so that vectors are smooth."""
    rng = np.random.default_rng(seed)
    made = []
    for b, h, w, c in shapes:
        decay = 2.0 ** -np.arange(w)[None, None, :, None]
        made.append(rng.standard_normal((b, h, w, c)) * decay)
    return made


def matrix(x, view):
    """One example `[h, w, c]` as the matrix of the card."""
    h, w, c = x.shape
    if view == "rows":
        return x.transpose(2, 0, 1).reshape(c * h, w)
    return x.reshape(h * w, c)


def aligned(student, teacher, vectors):
    """Weighted right singular vectors of one example, teacher by teacher vector."""
    _, _, s_rows = np.linalg.svd(student)
    _, values, t_rows = np.linalg.svd(teacher)
    values = values[:vectors] / np.linalg.norm(values[:vectors])
    of_student, of_teacher = [], []
    for value, t in zip(values, t_rows, strict=False):
        t = t if t[np.argmax(np.abs(t))] > 0 else -t
        closest = max(s_rows[: vectors + 3], key=lambda s: abs(s @ t))
        of_student.append(value * np.sign(closest @ t) * closest)
        of_teacher.append(value * t)
    return np.array(of_student), np.array(of_teacher)


def reference(students, teachers, vectors=1, view="rows"):
    """The loss of each example, entry by entry."""
    losses_ = []
    for example in range(len(students[0])):
        total, before = 0.0, None
        for s, t in zip(students, teachers, strict=True):
            now = aligned(matrix(s[example], view), matrix(t[example], view), vectors)
            if before is not None:
                for k in range(vectors):
                    rbf = [
                        np.exp(-((v[k][:, None] - u[k][None, :]) ** 2) / 8)
                        for v, u in zip(now, before, strict=True)
                    ]
                    total += np.sum((rbf[0] - rbf[1]) ** 2)
            before = now
        losses_.append(total)
    return np.array(losses_)


def floats(arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


CASES = {
    "one vector": ([(3, 4, 2), (2, 3, 5)], [(2, 4, 3), (3, 3, 4)], 1, "rows"),
    "three stages": (
        [(2, 4, 2), (2, 3, 2), (2, 2, 3)],
        [(2, 4, 2), (1, 3, 4), (3, 2, 2)],
        2,
        "rows",
    ),
    "pixels": ([(3, 2, 4), (2, 3, 3)], [(2, 2, 4), (2, 2, 3)], 2, "pixels"),
    "fewer rows than columns": (
        [(1, 5, 2), (1, 4, 2)],
        [(2, 5, 2), (1, 4, 3)],
        1,
        "rows",
    ),
}


def case(name):
    students, teachers, vectors, view = CASES[name]
    students = maps(1, *((2, *shape) for shape in students))
    teachers = maps(2, *((2, *shape) for shape in teachers))
    return students, teachers, {"vectors": vectors, "view": view}


@pytest.mark.parametrize("name", CASES)
def test_value_is_that_of_the_equations(name):
    students, teachers, options = case(name)
    got = losses.kdsvd(floats(students), floats(teachers), **options)
    expected = reference(students, teachers, **options)
    assert np.all(expected > 1e-6)
    np.testing.assert_allclose(got, expected, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_exact_singular_vectors(name):
    students, teachers, options = case(name)
    students, teachers = ([x[:1] for x in side] for side in (students, teachers))

    def total(maps):
        return jnp.sum(losses.kdsvd(maps, floats(teachers), **options))

    gradients = jax.jit(jax.grad(total))(floats(students))
    for stage, gradient in enumerate(gradients):
        numeric = np.zeros(gradient.shape)
        for index in np.ndindex(gradient.shape):
            sides = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in students]
                moved[stage][index] += step
                sides.append(reference(moved, teachers, **options)[0])
            numeric[index] = (sides[0] - sides[1]) / 2e-5
        largest = np.abs(numeric).max()
        assert largest > 1e-5
        np.testing.assert_allclose(gradient, numeric, rtol=1e-2, atol=5e-3 * largest)


def test_signs_do_not_depend_on_the_library():
    students, teachers, options = case("one vector")
    students, teachers = floats(students), floats(teachers)
    expected = losses.kdsvd(students, teachers, **options)
    # A reflected map has the same right singular vectors, with signs of its own.
    got = losses.kdsvd([-x for x in students], [-x for x in teachers], **options)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_equal_networks_have_no_loss():
    students, _, options = case("three stages")
    students = floats(students)
    np.testing.assert_array_equal(losses.kdsvd(students, students, **options), 0)


def test_a_single_stage_has_nothing_to_compare():
    (x, y) = floats(maps(3, (2, 3, 4, 2), (2, 3, 4, 2)))
    np.testing.assert_array_equal(losses.kdsvd([x], [y]), 0)


@pytest.mark.parametrize("kind", ["zeros", "equal singular values", "rank one", "huge"])
def test_gradient_is_finite_where_singular_vectors_are_not_defined(kind):
    x, t1, t2 = floats(maps(4, (1, 4, 4, 1), (1, 4, 4, 1), (1, 4, 4, 1)))
    x = {
        "zeros": jnp.zeros((1, 4, 4, 1)),
        "equal singular values": jnp.eye(4).reshape(1, 4, 4, 1),
        "rank one": jnp.ones((1, 4, 4, 1)),
        "huge": 1e18 * x,
    }[kind]
    value, gradient = jax.value_and_grad(
        lambda s: jnp.sum(losses.kdsvd([s, t1], [t2, t1]))
    )(x)
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(gradient))
    if kind in ("zeros", "equal singular values"):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 4, 2), (2, 3, 2)), {}, "view='rows'"),
        (((2, 4, 2), (2, 4, 3)), {"view": "pixels"}, "have 2 entries .* teacher 3"),
        (((2, 4, 2), (2, 4, 3)), {"vectors": 5}, "vectors must be at most 4"),
        (((2, 4, 2), (2, 4, 2)), {"vectors": 0}, "vectors must be > 0, got 0"),
    ],
)
def test_what_cannot_be_compared_is_named(shapes, options, message):
    s, t = floats(maps(5, *((1, *shape) for shape in shapes)))
    with pytest.raises(ValueError, match=message):
        losses.kdsvd([s, s], [t, t], **options)


def test_stages_must_match():
    x = jnp.ones((1, 2, 2, 1))
    with pytest.raises(ValueError, match="2 student maps and 1 teacher maps"):
        losses.kdsvd([x, x], [x])
