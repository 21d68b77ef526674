import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.distill.modules import apply_module
from jaxkd.layers import Outputs
from jaxkd.layers.connectors import ConvNorm, Projector, shrink_to

STUDENT = {"stage1": (8, 8, 3), "stage2": (4, 4, 4), "pooled": (4,)}
TEACHER = {"stage1": (8, 8, 5), "stage2": (2, 2, 6), "pooled": (6,)}


def outputs(shapes, seed, *, head=None, classes=5):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    taps = {tap: normal(2, *shape) for tap, shape in shapes.items()}
    if head is not None:
        head = {"kernel": normal(head, classes), "bias": normal(classes)}
    return Outputs(logits=normal(2, classes), taps=taps, head=head)


@pytest.fixture
def run(classification):
    return dataclasses.replace(
        classification,
        student=outputs(STUDENT, 0),
        teachers=(outputs(TEACHER, 1, head=6),),
    )


def start(run, method):
    """State of the method's shapes; compiling its own `init` takes seconds."""
    params, memory = jax.eval_shape(lambda: run.init(method))
    rng = np.random.default_rng(3)
    return (
        jax.tree.map(lambda x: jnp.float32(rng.uniform(-0.5, 0.5, x.shape)), params),
        jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), memory),
    )


def step(run, method, state, **inputs):
    return jax.jit(method.terms)(*state, run.inputs(**inputs))


def with_teacher(run, teacher):
    return dataclasses.replace(run, teachers=(teacher,))


def test_srrl_compares_vectors_and_the_teachers_view_of_them(run):
    method = distill.create("srrl")
    state = start(run, method)
    values, memory = step(run, method, state)
    connected, statistics = apply_module(
        ConvNorm(6, relu=True), *state, run.student.taps["stage2"], train=True
    )
    feature, teacher = connected.mean((1, 2)), run.teacher
    np.testing.assert_allclose(
        values["feature"], losses.hint(feature, teacher.taps["pooled"]), rtol=1e-5
    )
    expected = losses.softmax_regression(feature, teacher.logits, **teacher.head)
    np.testing.assert_allclose(values["regression"], expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        memory,
        dict(statistics),
    )


def test_srrl_weights_are_options():
    assert distill.create("srrl").weights == {"feature": 1.0, "regression": 1.0}
    weights = distill.create("srrl", alpha=2.0, beta=3.0).weights
    assert weights == {"feature": 2.0, "regression": 3.0}


def test_srrl_lets_classes_differ(run):
    other = with_teacher(run, outputs(TEACHER, 1, head=6, classes=7))
    method = distill.create("srrl")
    values, _ = step(other, method, start(other, method))
    assert values["regression"].shape == (2,)


@pytest.mark.parametrize("method", ["srrl", "simkd"])
def test_a_teacher_without_a_head_is_an_error(run, method):
    bare = with_teacher(run, outputs(TEACHER, 1))
    message = f"{method} reuses the teacher's last linear layer, but network 'teacher'"
    with pytest.raises(ValueError, match=message):
        bare.init(distill.create(method))


def test_simkd_imitates_the_last_map_and_nothing_else(run):
    method = distill.create("simkd", factor=3)
    assert method.weights == {"simkd": 1.0}
    params, memory = start(run, method)
    assert params["conv0"]["kernel"].shape == (1, 1, 4, 2)
    values, after = step(run, method, (params, memory))
    projected, statistics = apply_module(
        Projector(6, 3, (2, 2)),
        params,
        memory["projector"],
        run.student.taps["stage2"],
        train=True,
    )
    np.testing.assert_allclose(
        values["simkd"], losses.hint(projected, run.teacher.taps["stage2"]), rtol=1e-5
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        after["projector"],
        dict(statistics),
    )


def test_simkd_pools_the_teacher_where_it_is_larger(run):
    method = distill.create("simkd")
    large = outputs({**TEACHER, "stage2": (8, 8, 6)}, 2, head=6)
    pooled = large.replace(
        taps={**large.taps, "stage2": shrink_to(large.taps["stage2"], (4, 4))}
    )
    # Only "size" differs between the two memories.
    state = start(with_teacher(run, large), method)
    expected = start(with_teacher(run, pooled), method)
    np.testing.assert_allclose(
        step(with_teacher(run, large), method, state)[0]["simkd"],
        step(with_teacher(run, pooled), method, expected)[0]["simkd"],
        rtol=1e-5,
    )


def test_simkd_predicts_with_the_teachers_classifier(run):
    method = distill.create("simkd")
    assert method.readout is not None
    params, memory = start(run, method)
    _, memory = step(run, method, (params, memory))
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(memory["head"][name], run.teacher.head[name])
    logits = jax.jit(method.readout)(params, memory, run.student)
    projected, _ = apply_module(
        Projector(6, 2, (2, 2)),
        params,
        memory["projector"],
        run.student.taps["stage2"],
        train=False,
    )
    head = jax.tree.map(np.float64, run.teacher.head)
    expected = np.float64(projected).mean((1, 2)) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    # Evaluation must not depend on what else is in the batch.
    one = jax.tree.map(lambda x: x[:1], run.student)
    alone = jax.jit(method.readout)(params, memory, one)
    np.testing.assert_allclose(alone, logits[:1], rtol=1e-4, atol=1e-5)


def test_simkd_reads_out_zeros_before_the_first_step(run):
    method = distill.create("simkd")
    params, memory = start(run, method)
    memory["head"] = jax.jit(lambda: run.init(method)[1]["head"])()
    assert method.readout is not None
    logits = jax.jit(method.readout)(params, memory, run.student)
    np.testing.assert_array_equal(logits, jnp.zeros((2, 5)))


def test_simkd_puts_the_missing_relu_before_the_pooling(run):
    """In pre-activation networks the last stage is not what is pooled."""
    before = outputs({"stage2_pre": (2, 2, 6)}, 7).taps["stage2_pre"]
    teacher = run.teacher.replace(taps={**run.teacher.taps, "stage2_pre": before})
    plain = run.teacher.replace(
        taps={**run.teacher.taps, "stage2": jnp.maximum(before, 0)}
    )
    method = distill.create("simkd")
    state = start(run, method)
    expected, _ = step(with_teacher(run, plain), method, state)
    values, _ = step(with_teacher(run, teacher), method, state)
    np.testing.assert_allclose(values["simkd"], expected["simkd"], rtol=1e-6)
    named = distill.create("simkd", teacher_tap="stage2")
    other, _ = step(with_teacher(run, teacher), named, state)
    assert jnp.all(other["simkd"] != expected["simkd"])


def test_simkd_names_what_does_not_fit(run):
    wide = with_teacher(run, outputs({**TEACHER, "pooled": (9,)}, 1, head=9))
    message = "'stage2' of network 'teacher' has 6 channels but its last layer reads 9"
    with pytest.raises(ValueError, match=message):
        wide.init(distill.create("simkd"))
    other = with_teacher(run, outputs(TEACHER, 1, head=6, classes=7))
    with pytest.raises(ValueError, match="7 classes and student logits 5"):
        other.init(distill.create("simkd"))
    with pytest.raises(ValueError, match="factor 7 leaves no channel of the 6"):
        run.init(distill.create("simkd", factor=7))
    with pytest.raises(ValueError, match="factor must be >= 1"):
        distill.create("simkd", factor=0)
