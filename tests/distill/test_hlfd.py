import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxkd import distill, losses
from jaxkd.layers import Outputs


def fixed(**options):
    return distill.create("hlfd", projection="fixed", **options)


def test_flfd_is_the_published_sum(segmentation):
    s, t = segmentation.student.taps, segmentation.teacher.taps
    unified = losses.unified_importance_map_distillation(
        s["e1"], [t["e2"], t["e3"], t["e4"]]
    )
    individual = sum(
        losses.importance_map_distillation(s[tap], t["e5"])
        for tap in ("e2", "e3", "e4")
    )
    value = segmentation.terms(fixed())["flfd"]
    np.testing.assert_allclose(value, 0.5 * unified + 0.5 * individual, rtol=1e-5)


def test_plfd_is_the_published_sum(segmentation):
    s, t = segmentation.student.taps, segmentation.teacher.taps
    params, memory = segmentation.init(fixed())
    assert params == {}

    def drawn(tap):
        return memory[tap]["kernel"], memory[tap]["bias"]

    unified = losses.unified_prediction_map_distillation(
        s["d5"], [t["d5"], t["d4"], t["d3"]], *drawn("d5")
    )
    individual = sum(
        losses.prediction_map_distillation(s[tap], t["out"], *drawn(tap))
        for tap in ("d4", "d3", "d2")
    )
    value = segmentation.terms(fixed())["plfd"]
    np.testing.assert_allclose(value, 0.5 * unified + 0.5 * individual, rtol=1e-5)


def test_weights_are_the_published_ones():
    assert fixed().weights == {"flfd": 0.9, "plfd": 0.1}
    assert fixed(alpha=0.3, beta=0.0).weights == {"flfd": 0.0, "plfd": 0.3}


def test_weights_may_be_schedules():
    method = fixed(alpha=lambda step: step / 10)
    np.testing.assert_allclose(
        distill.weight_at(method.weights["plfd"], jnp.array(5.0)), 0.5
    )


def test_resampled_projections_make_plfd_random_and_flfd_not(segmentation):
    method = distill.create("hlfd")
    assert segmentation.init(method) == ({}, {})
    first, again, other = (segmentation.terms(method, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first["plfd"], again["plfd"])
    assert jnp.all(first["plfd"] != other["plfd"])
    np.testing.assert_array_equal(first["flfd"], other["flfd"])


def test_fixed_projections_stay_in_memory(segmentation):
    state = segmentation.init(fixed())
    _, memory = segmentation.step(fixed(), state=state)
    jax.tree.map(np.testing.assert_array_equal, memory, state[1])


def test_learned_projections_get_a_gradient(segmentation):
    method = distill.create("hlfd", projection="learned")
    params, memory = segmentation.init(method)
    assert set(params) == {"d5", "d4", "d3", "d2"}

    def total(params):
        return segmentation.terms(method, state=(params, memory))["plfd"].sum()

    for gradient in jax.tree.leaves(jax.jit(jax.grad(total))(params)):
        assert jnp.any(gradient != 0)


def test_the_taps_of_the_card_learn_and_no_others(segmentation):
    def total(student):
        terms = segmentation.terms(fixed(), student=student)
        return terms["flfd"].sum() + terms["plfd"].sum()

    gradient = jax.jit(jax.grad(total))(segmentation.student)
    taught = {tap for tap, g in gradient.taps.items() if jnp.any(g != 0)}
    assert taught == {"e1", "e2", "e3", "e4", "d5", "d4", "d3", "d2"}
    np.testing.assert_array_equal(gradient.logits, 0)


def test_other_taps_may_be_named(segmentation):
    method = fixed(
        student_first="e2",
        student_encoder=("e5",),
        student_deepest="d3",
        student_decoder=("d2",),
        teacher_encoder=("e1",),
        teacher_last="e4",
        teacher_decoder=("d2",),
        teacher_output="d5",
    )
    _, memory = segmentation.init(method)
    assert memory["d3"]["kernel"].shape == (4, 3)
    assert memory["d2"]["kernel"].shape == (3, 3)
    s, t = segmentation.student.taps, segmentation.teacher.taps
    expected = 0.5 * losses.unified_importance_map_distillation(s["e2"], [t["e1"]])
    expected += 0.5 * losses.importance_map_distillation(s["e5"], t["e4"])
    value = segmentation.terms(method)["flfd"]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_options_reach_the_losses(segmentation):
    default = segmentation.terms(fixed())
    for options, term in (
        ({"exponent": 2}, "flfd"),
        ({"temperature": 1.0}, "plfd"),
        ({"pmd_norm": "pixel"}, "plfd"),
    ):
        values = segmentation.terms(fixed(**options))
        other = ({"flfd", "plfd"} - {term}).pop()
        assert jnp.all(values[term] != default[term])
        np.testing.assert_array_equal(values[other], default[other])


def test_eight_devices_equal_one(segmentation):
    """With resampled projections: every device must draw the same ones."""
    method = distill.create("hlfd")
    repeat = jax.tree.map(
        lambda x: jnp.concatenate([x, 0.5 * x, -x, 2 * x]),
        (segmentation.student, segmentation.teacher),
    )

    @jax.jit
    def value_and_gradient(student, teacher, key):
        def total(student):
            inputs = segmentation.inputs(student=student)
            inputs = inputs.replace(teachers=(teacher,), key=key)
            terms, _ = method.terms({}, {}, inputs)
            return terms["flfd"].mean() + terms["plfd"].mean()

        return jax.value_and_grad(total)(student)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    expected = value_and_gradient(*repeat, jax.random.key(0))
    sharded = value_and_gradient(*jax.device_put(repeat, sharding), jax.random.key(0))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        sharded,
        expected,
    )


def test_state_has_abstract_shapes(segmentation):
    """`init` runs under eval_shape before any array exists."""
    method = distill.create("hlfd", projection="learned")
    params, _ = jax.eval_shape(
        lambda key: method.init(key, segmentation.specs), jax.random.key(0)
    )
    assert params["d5"]["kernel"].shape == (9, 5)


def test_a_student_without_decoder_taps_is_an_error(segmentation):
    taps = {k: v for k, v in segmentation.student.taps.items() if k != "d3"}
    student = Outputs(logits=segmentation.student.logits, taps=taps)
    run = dataclasses.replace(segmentation, student=student)
    with pytest.raises(KeyError, match="network 'student' has no tap 'd3'"):
        run.init(fixed())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "temperature must be > 0, got 0"),
        ({"exponent": 3}, "exponent must be a positive even integer, got 3"),
        ({"teacher_encoder": ()}, "unified transfer needs one or more teacher taps"),
        ({"student_decoder": ("d4", "d4")}, "different student layers"),
    ],
)
def test_impossible_options_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        distill.create("hlfd", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"projection": "frozen"}, "'projection' must be one of 'resample', 'fixed'"),
        ({"pmd_norm": "none"}, "'pmd_norm' must be one of 'code', 'pixel'"),
        ({"alpa": 0.1}, "did you mean 'alpha'"),
    ],
)
def test_unknown_options_are_an_error(options, message):
    with pytest.raises(TypeError, match=message):
        distill.create("hlfd", **options)
