import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.layers import NetworkSpec, Outputs
from jaxkd.layers.connectors import ConvNorm
from jaxkd.numerics import adaptive_average_pool, resize_bilinear

BATCH, CLASSES = 4, 5


def network(seed, size, channels):
    """A classifier with one map, which its head reads after pooling."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    stage = normal(BATCH, *size, channels)
    pooled = jnp.mean(stage, axis=(1, 2))
    head = {"kernel": normal(channels, CLASSES), "bias": normal(CLASSES)}
    logits = pooled @ head["kernel"] + head["bias"][None]
    return Outputs(logits=logits, taps={"stage1": stage, "pooled": pooled}, head=head)


@pytest.fixture
def several(classification):
    """A student between a teacher with smaller and one with larger maps."""
    return dataclasses.replace(
        classification,
        student=network(0, (4, 4), 3),
        teachers=(network(1, (2, 2), 6), network(2, (7, 5), 2)),
        batch={"label": jnp.array([3, 0, 4, 4], jnp.int32)},
    )


def logits(run):
    return run.student.logits, [teacher.logits for teacher in run.teachers]


def test_averaged_teachers_average_what_is_asked(several):
    student, teachers = logits(several)
    shares = (1.0, 3.0)

    def value(average):
        method = distill.create(
            "averaged_teachers",
            average=average,
            temperature=2.0,
            teacher_weights=shares,
        )
        return several.terms(method)["averaged_teachers"]

    parts = [losses.kd(student, t, temperature=2.0) for t in teachers]
    expected = 0.25 * parts[0] + 0.75 * parts[1]
    np.testing.assert_allclose(value("losses"), expected, rtol=1e-5)
    mean = 0.25 * teachers[0] + 0.75 * teachers[1]
    expected = losses.kd(student, mean, temperature=2.0)
    np.testing.assert_allclose(value("logits"), expected, rtol=1e-5)
    soft = [jax.nn.softmax(t / 2.0) for t in teachers]
    mean = 2.0 * jnp.log(0.25 * soft[0] + 0.75 * soft[1])
    expected = losses.kd(student, mean, temperature=2.0)
    np.testing.assert_allclose(value("probabilities"), expected, rtol=1e-4)


def test_ebkd_is_its_loss(several):
    student, teachers = logits(several)
    value = several.terms(distill.create("ebkd", temperature=lambda step: 2.0))["ebkd"]
    np.testing.assert_array_equal(
        value, losses.ebkd(student, teachers, temperature=2.0)
    )


def projections(run, params, memory):
    """The student's map at each teacher's size, through the connectors."""
    stage = run.student.taps["stage1"]
    resized = adaptive_average_pool(stage, (2, 2)), resize_bilinear(stage, (7, 5))
    return [
        ConvNorm(channels, relu=True).apply(
            {"params": params[name], **memory[name]}, x, True, mutable=["batch_stats"]
        )[0]
        for name, channels, x in zip(params, (6, 2), resized, strict=True)
    ]


@pytest.mark.parametrize("hint_weights", ["teacher", "projected"])
def test_camkd_weighs_predictions_and_projected_maps(several, hint_weights):
    student, teachers = logits(several)
    labels = several.batch["label"]
    method = distill.create("camkd", hint_weights=hint_weights, alpha=2.0)
    assert method.weights == {"kd": 2.0, "hint": 50.0}
    params, memory = several.init(method)
    assert list(params) == ["teacher0", "teacher1"]
    terms, new_memory = several.step(method, state=(params, memory))
    np.testing.assert_array_equal(terms["kd"], losses.camkd(student, teachers, labels))

    projected = projections(several, params, memory)
    judged = teachers
    if hint_weights == "projected":
        judged = [
            jnp.mean(x, (1, 2)) @ t.head["kernel"] + t.head["bias"][None]
            for x, t in zip(projected, several.teachers, strict=True)
        ]
    expected = losses.weighted_hint(
        projected,
        [t.taps["stage1"] for t in several.teachers],
        losses.confidence_weights(judged, labels),
    )
    np.testing.assert_allclose(terms["hint"], expected, rtol=1e-5)
    # The connectors' norms have seen the batch.
    assert jax.tree.structure(new_memory) == jax.tree.structure(memory)
    old, new = (
        m["teacher0"]["batch_stats"]["norm"]["mean"] for m in (memory, new_memory)
    )
    assert jnp.all(old == 0) and jnp.any(new != 0)


def test_camkd_trains_the_student_and_the_connectors_but_no_teacher(several):
    method = distill.create("camkd", hint_weights="projected")
    params, memory = several.init(method)

    def total(params, student, teachers):
        run = dataclasses.replace(several, student=student, teachers=teachers)
        terms = run.terms(method, state=(params, memory))
        return jnp.mean(terms["hint"]) + jnp.mean(terms["kd"])

    connectors, student, teachers = jax.grad(total, (0, 1, 2))(
        params, several.student, several.teachers
    )
    for name in params:
        assert jnp.any(connectors[name]["conv"]["kernel"] != 0)
    assert jnp.any(student.taps["stage1"] != 0) and jnp.any(student.logits != 0)
    assert not any(jnp.any(x != 0) for x in jax.tree.leaves(teachers))


def test_camkd_takes_named_taps(several):
    teachers = tuple(
        t.replace(taps={"features": t.taps["stage1"]}) for t in several.teachers
    )
    renamed = dataclasses.replace(several, teachers=teachers)
    named = distill.create("camkd", teacher_taps=("features", "features"))
    np.testing.assert_array_equal(
        renamed.terms(named)["hint"], several.terms(distill.create("camkd"))["hint"]
    )


@pytest.mark.parametrize("name", ["ebkd", "camkd"])
def test_weights_by_confidence_need_two_teachers(several, name):
    single = dataclasses.replace(several, teachers=several.teachers[:1])
    with pytest.raises(ValueError, match=f"'{name}' needs at least 2 teachers, the"):
        single.init(distill.create(name))


def test_impossible_options_and_networks_are_one_line(several):
    create = distill.create
    with pytest.raises(ValueError, match="has 1 numbers for 2 teachers"):
        several.init(create("averaged_teachers", teacher_weights=(1.0,)))
    with pytest.raises(ValueError, match="must be finite and >= 0"):
        create("averaged_teachers", teacher_weights=(-1.0, 2.0))
    with pytest.raises(ValueError, match=r"names 1 taps \(stage1\) for 2 teachers"):
        several.init(create("camkd", teacher_taps=("stage1",)))
    with pytest.raises(ValueError, match="needs maps"):
        several.init(create("camkd", student_tap="pooled"))
    with pytest.raises(KeyError, match="no tap 'stage9'"):
        several.init(create("camkd", student_tap="stage9"))
    with pytest.raises(ValueError, match="temperature must be > 0"):
        create("camkd", temperature=0.0)
    second = several.teachers[1].replace(head=None)
    headless = dataclasses.replace(several, teachers=(several.teachers[0], second))
    with pytest.raises(ValueError, match="set hint_weights to 'teacher'"):
        headless.init(create("camkd", hint_weights="projected"))


def test_the_state_of_camkd_is_known_before_any_array(several):
    method = distill.create("camkd")
    specs = several.specs
    assert isinstance(specs.student, NetworkSpec)
    shapes = jax.eval_shape(lambda key: method.init(key, specs), jax.random.key(0))
    kernel = shapes[0]["teacher1"]["conv"]["kernel"]
    assert kernel.shape == (1, 1, 3, 2)
