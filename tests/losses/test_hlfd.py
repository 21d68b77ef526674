import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxkd import losses
from jaxkd.numerics import resize_bilinear


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def maps(rng):
    """Makes random maps of given sizes."""

    def make(*shapes, batch=2):
        arrays = (rng.standard_normal((batch, *shape)) for shape in shapes)
        return [jnp.asarray(x, jnp.float32) for x in arrays]

    return make


resize = jax.jit(resize_bilinear, static_argnums=1)


def slow_concatenation(xs, size):
    """The published order: resize to the smallest, concatenate, resize to `size`."""
    smallest = min(x.shape[1:3] for x in xs)
    joined = jnp.concatenate([resize(x, smallest) for x in xs], axis=-1)
    return joined, resize(joined, size)


def slow_importance(x, exponent=4):
    a = np.mean(np.float64(x) ** exponent, axis=-1).reshape(len(x), -1)
    return a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12)


def slow_divergence(student, teacher, temperature):
    """Per example, divided by h w c / 2."""
    p = scipy.special.log_softmax(np.float64(student) / temperature, axis=-1)
    q = scipy.special.log_softmax(np.float64(teacher) / temperature, axis=-1)
    total = np.sum(np.exp(q) * (q - p), axis=(1, 2, 3))
    return temperature**2 * total / (math.prod(student.shape[1:]) / 2)


class TestImportanceMap:
    def test_by_hand(self):
        # Means of fourth powers: (1 + 1) / 2 = 1 and (16 + 0) / 2 = 8.
        x = jnp.array([[[[1.0, -1.0], [2.0, 0.0]]]])
        expected = np.array([[1.0, 8.0]]) / math.sqrt(65)
        np.testing.assert_allclose(losses.importance_map(x), expected, rtol=1e-6)

    @pytest.mark.parametrize("exponent", [2, 4, 6])
    def test_is_a_unit_vector_that_ignores_scale(self, maps, exponent):
        (x,) = maps((3, 4, 5))
        value = losses.importance_map(x, exponent=exponent)
        np.testing.assert_allclose(jnp.linalg.norm(value, axis=-1), 1, rtol=1e-5)
        scaled = losses.importance_map(7.0 * x, exponent=exponent)
        np.testing.assert_allclose(scaled, value, rtol=1e-4)

    def test_agrees_with_numpy(self, maps):
        (x,) = maps((3, 4, 5))
        np.testing.assert_allclose(
            losses.importance_map(x), slow_importance(x), rtol=1e-5, atol=1e-7
        )

    def test_of_zeros_is_zero_with_zero_gradient(self):
        x = jnp.zeros((2, 3, 3, 4))
        np.testing.assert_array_equal(losses.importance_map(x), 0)
        gradient = jax.jit(jax.grad(lambda x: losses.importance_map(x).sum()))(x)
        np.testing.assert_array_equal(gradient, 0)

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_powers_do_not_overflow_half_precision(self, dtype):
        x = jnp.full((1, 2, 2, 3), 300.0, dtype)
        value = losses.importance_map(x)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, 0.5, rtol=1e-5)

    @pytest.mark.parametrize("exponent", [0, 3, -2])
    def test_rejects_odd_exponents(self, maps, exponent):
        with pytest.raises(ValueError, match=f"even integer, got {exponent}"):
            losses.importance_map(*maps((2, 2, 3)), exponent=exponent)

    def test_rejects_vectors(self):
        with pytest.raises(ValueError, match=r"got shape \(2, 3\)"):
            losses.importance_map_distillation(
                jnp.zeros((2, 2, 2, 1)), jnp.zeros((2, 3))
            )


class TestImportanceTransfers:
    def test_disjoint_maps_are_as_far_apart_as_unit_vectors_can_be(self):
        student = jnp.zeros((1, 2, 2, 3)).at[0, 0, 0].set(1.0)
        teacher = jnp.zeros((1, 2, 2, 5)).at[0, 1, 1].set(2.0)
        value = losses.importance_map_distillation(student, teacher)
        np.testing.assert_allclose(value, [2.0], rtol=1e-6)

    def test_scale_and_channels_of_the_teacher_do_not_matter(self, maps):
        student, teacher = maps((3, 4, 5), (3, 4, 2))
        value = losses.importance_map_distillation(student, teacher)
        doubled = jnp.concatenate([-3.0 * teacher, 3.0 * teacher], axis=-1)
        same = losses.importance_map_distillation(student, doubled)
        np.testing.assert_allclose(same, value, rtol=1e-4, atol=1e-6)

    def test_individual_transfer_resizes_the_student(self, maps):
        student, teacher = maps((6, 5, 3), (4, 8, 2))
        value = losses.importance_map_distillation(student, teacher)
        resized = resize_bilinear(student, (4, 8))
        difference = slow_importance(resized) - slow_importance(teacher)
        np.testing.assert_allclose(value, (difference**2).sum(-1), rtol=1e-4)

    def test_unified_transfer_equals_the_published_order(self, maps):
        student, *teachers = maps((6, 8, 3), (8, 8, 2), (4, 9, 5), (4, 6, 1))
        value = losses.unified_importance_map_distillation(student, teachers)
        _, joined = slow_concatenation(teachers, (6, 8))
        difference = slow_importance(student) - slow_importance(joined)
        np.testing.assert_allclose(value, (difference**2).sum(-1), rtol=1e-4)

    def test_concatenated_transfer_equals_the_published_order(self, maps):
        teacher, *students = maps((3, 3, 4), (8, 8, 2), (4, 9, 5), (6, 6, 1))
        value = losses.concatenated_importance_map_distillation(students, teacher)
        _, joined = slow_concatenation(students, (3, 3))
        difference = slow_importance(joined) - slow_importance(teacher)
        np.testing.assert_allclose(value, (difference**2).sum(-1), rtol=1e-4)

    def test_every_student_map_learns(self, maps):
        teacher, *students = maps((3, 3, 4), (8, 8, 2), (4, 9, 5))
        gradients = jax.grad(
            lambda s: losses.concatenated_importance_map_distillation(s, teacher).sum()
        )(students)
        assert all(jnp.any(g != 0) for g in gradients)


class TestProject:
    @pytest.mark.parametrize("width", [2, 40])
    @pytest.mark.parametrize(
        "sizes, size",
        [
            ([(6, 6)], (6, 6)),
            ([(3, 4)], (9, 8)),
            ([(9, 8)], (3, 4)),
            ([(8, 8), (4, 4), (6, 5)], (12, 12)),
            ([(8, 8), (9, 7)], (2, 3)),
            ([(5, 5), (4, 9)], None),
        ],
    )
    def test_equals_concatenating_projecting_and_resizing(
        self, maps, rng, sizes, size, width
    ):
        xs = maps(*((*s, c) for s, c in zip(sizes, (3, 17, 2), strict=False)))
        channels = sum(x.shape[-1] for x in xs)
        kernel = jnp.asarray(rng.standard_normal((channels, width)), jnp.float32)
        bias = jnp.asarray(rng.standard_normal(width), jnp.float32)
        size = size or min(sizes)

        @jax.jit
        def both(xs, kernel, bias):
            joined, _ = slow_concatenation(xs, size)
            slow = resize(joined @ kernel + bias[None, None, None], size)
            return losses.project(xs, kernel, bias, size=size), slow

        value, expected = both(xs, kernel, bias)
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)

    def test_upsampling_happens_behind_the_projection(self):
        """The wide map at the large size must not exist."""

        def run(x, kernel):
            return losses.project([x], kernel, size=(64, 64))

        jaxpr = jax.make_jaxpr(run)(jnp.zeros((1, 4, 4, 128)), jnp.zeros((128, 2)))
        largest = max(v.aval.size for e in jaxpr.eqns for v in e.outvars)
        assert largest == 64 * 64 * 2

    def test_shrinking_happens_before_the_projection(self):
        def run(x, kernel):
            return losses.project([x], kernel, size=(4, 4))

        jaxpr = jax.make_jaxpr(run)(jnp.zeros((1, 64, 64, 2)), jnp.zeros((2, 128)))
        largest = max(v.aval.size for e in jaxpr.eqns for v in e.outvars)
        assert largest <= 64 * 64 * 2

    def test_without_a_kernel_only_resizes(self, maps):
        (x,) = maps((4, 4, 3))
        np.testing.assert_array_equal(losses.project([x]), x)
        expected = resize_bilinear(x, (2, 2))
        np.testing.assert_array_equal(losses.project([x], size=(2, 2)), expected)

    def test_keeps_half_precision_maps_but_sums_in_float32(self, maps):
        (x,) = maps((4, 4, 3))
        value = losses.project([x.astype(jnp.bfloat16)], jnp.ones((3, 2)))
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value[..., 0], x.sum(-1), rtol=0.02, atol=0.05)

    def test_rejects_a_kernel_for_other_channels(self, maps):
        xs = maps((4, 4, 3), (4, 4, 2))
        with pytest.raises(ValueError, match=r"takes 4 channels .* have 3 \+ 2"):
            losses.project(xs, jnp.ones((4, 2)))

    def test_rejects_several_maps_without_a_kernel(self, maps):
        with pytest.raises(ValueError, match="need a projection kernel"):
            losses.project(maps((4, 4, 3), (4, 4, 2)))
        with pytest.raises(ValueError, match="need a projection kernel"):
            losses.project(maps((4, 4, 3)), bias=jnp.ones(3))


class TestPredictionTransfers:
    def test_by_hand(self):
        # One pixel, q = (3/4, 1/4), p = (1/2, 1/2), T = 2, divided by 1 * 1 * 2 / 2.
        teacher = jnp.array([[[[2 * math.log(3), 0.0]]]])
        student = jnp.array([[[[1.0, 1.0]]]])
        value = losses.prediction_map_distillation(student, teacher, temperature=2.0)
        expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
        np.testing.assert_allclose(value, [expected], rtol=1e-6)

    @pytest.mark.parametrize("norm, factor", [("code", 1.0), ("pixel", 3.0)])
    def test_norm_chooses_the_divisor(self, maps, norm, factor):
        student, teacher = maps((3, 4, 6), (3, 4, 6))
        value = losses.prediction_map_distillation(student, teacher, norm=norm)
        expected = factor * slow_divergence(student, teacher, 4.0)
        np.testing.assert_allclose(value, expected, rtol=1e-4)

    def test_norms_agree_on_two_classes(self, maps):
        pair = maps((3, 4, 2), (3, 4, 2))
        np.testing.assert_allclose(
            losses.prediction_map_distillation(*pair, norm="code"),
            losses.prediction_map_distillation(*pair, norm="pixel"),
        )

    def test_of_two_classes_is_the_mean_of_pixelwise_kd(self, maps):
        pair = maps((3, 4, 2), (3, 4, 2))
        np.testing.assert_allclose(
            losses.prediction_map_distillation(*pair),
            losses.kd(*pair).mean((1, 2)),
            rtol=1e-5,
        )

    def test_individual_transfer_projects_then_resizes_the_student(self, maps, rng):
        student, teacher = maps((3, 4, 5), (6, 6, 2))
        kernel = jnp.asarray(rng.standard_normal((5, 2)), jnp.float32)
        bias = jnp.array([0.3, -0.2])
        value = losses.prediction_map_distillation(student, teacher, kernel, bias)
        projected = resize_bilinear(student @ kernel + bias[None, None, None], (6, 6))
        expected = slow_divergence(projected, teacher, 4.0)
        np.testing.assert_allclose(value, expected, rtol=1e-4)

    def test_unified_transfer_equals_the_published_order(self, maps, rng):
        student, *teachers = maps((6, 8, 5), (8, 8, 2), (4, 9, 5), (4, 6, 1))
        kernel = jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)
        bias = jnp.asarray(rng.standard_normal(5), jnp.float32)
        value = losses.unified_prediction_map_distillation(
            student, teachers, kernel, bias, temperature=2.0
        )
        joined, _ = slow_concatenation(teachers, (6, 8))
        target = resize_bilinear(joined @ kernel + bias[None, None, None], (6, 8))
        expected = slow_divergence(student, target, 2.0)
        np.testing.assert_allclose(value, expected, rtol=1e-4)

    def test_unified_transfer_trains_its_projection_but_not_the_teacher(self, maps):
        student, teacher = maps((4, 4, 3), (4, 4, 2))

        def total(teacher, kernel, bias):
            return losses.unified_prediction_map_distillation(
                student, [teacher], kernel, bias
            ).sum()

        grads = jax.grad(total, (0, 1, 2))(teacher, jnp.ones((2, 3)), jnp.ones(3))
        np.testing.assert_array_equal(grads[0], 0)
        assert jnp.any(grads[1] != 0) and jnp.any(grads[2] != 0)

    def test_concatenated_transfer_of_one_map_is_the_individual_one(self, maps):
        student, teacher = maps((4, 4, 3), (6, 6, 2))
        kernel, bias = jnp.ones((3, 2)).at[0].set(-1.0), jnp.array([0.5, 0.0])
        np.testing.assert_array_equal(
            losses.concatenated_prediction_map_distillation(
                [student], teacher, kernel, bias
            ),
            losses.prediction_map_distillation(student, teacher, kernel, bias),
        )

    def test_order_of_the_students_follows_the_kernel(self, maps, rng):
        teacher, a, b = maps((4, 4, 2), (4, 4, 3), (8, 8, 1))
        kernel = jnp.asarray(rng.standard_normal((4, 2)), jnp.float32)
        swapped = jnp.concatenate([kernel[3:], kernel[:3]])
        np.testing.assert_allclose(
            losses.concatenated_prediction_map_distillation([a, b], teacher, kernel),
            losses.concatenated_prediction_map_distillation([b, a], teacher, swapped),
            rtol=1e-5,
        )

    def test_divergence_teaches_both_sides(self, maps):
        pair = maps((2, 2, 3), (2, 2, 3))
        grads = jax.grad(lambda *p: losses.prediction_map_divergence(*p).sum(), (0, 1))(
            *pair
        )
        assert all(jnp.any(g != 0) for g in grads)

    def test_a_projection_and_its_negative_together_ignore_the_teacher(self, maps):
        """Why untrained projections, drawn anew at each step, cannot teach."""
        student, one, other = maps((4, 4, 3), (4, 4, 2), (4, 4, 2))
        kernel = jnp.array([[1.0, -1.0], [0.5, 0.3], [-1.0, 0.2]])
        bias = jnp.array([0.5, 0.1])

        def gradient(teacher):
            def total(student):
                return sum(
                    losses.prediction_map_distillation(
                        student, teacher, sign * kernel, sign * bias
                    ).sum()
                    for sign in (1, -1)
                )

            return jax.jit(jax.grad(total))(student)

        np.testing.assert_allclose(gradient(one), gradient(other), atol=1e-6)
        assert jnp.max(jnp.abs(gradient(one))) > 1e-3

    def test_permuted_unified_projections_together_ignore_the_teacher(self, maps):
        student, one, other = maps((4, 4, 3), (4, 4, 5), (4, 4, 5))
        kernel = jnp.linspace(-1.0, 1.0, 15).reshape(5, 3) ** 3
        bias = jnp.array([0.5, 0.1, -0.3])

        def gradient(teacher):
            def total(student):
                return sum(
                    losses.unified_prediction_map_distillation(
                        student,
                        [teacher],
                        jnp.roll(kernel, shift, axis=1),
                        jnp.roll(bias, shift),
                    ).sum()
                    for shift in range(3)
                )

            return jax.jit(jax.grad(total))(student)

        np.testing.assert_allclose(gradient(one), gradient(other), atol=1e-6)
        assert jnp.max(jnp.abs(gradient(one))) > 1e-3

    def test_rejects_one_channel(self, maps):
        with pytest.raises(ValueError, match="at least 2 channels"):
            losses.prediction_map_distillation(*maps((2, 2, 1), (2, 2, 1)))

    def test_rejects_maps_that_do_not_fit(self, maps):
        with pytest.raises(ValueError, match=r"\(2, 2, 2, 3\) \(student\)"):
            losses.prediction_map_distillation(*maps((2, 2, 3), (2, 2, 2)))

    def test_rejects_impossible_options(self, maps):
        pair = maps((2, 2, 2), (2, 2, 2))
        with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
            losses.prediction_map_distillation(*pair, temperature=0)


def test_losses_do_not_depend_on_the_size_of_the_batch(maps):
    """The divisors hold no batch size: the mean over the batch is the published B."""
    pair = maps((4, 4, 2), (4, 4, 2), batch=3)
    for loss in losses.importance_map_distillation, losses.prediction_map_distillation:
        whole = loss(*pair)
        parts = [loss(*(x[i : i + 1] for x in pair)) for i in range(3)]
        np.testing.assert_allclose(whole, jnp.concatenate(parts), rtol=1e-5)
