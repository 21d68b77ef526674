import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.distill.modules import apply_module
from jaxkd.layers import Outputs
from jaxkd.layers.connectors import Review

STUDENT = {"stage1": (4, 4, 3), "stage2": (2, 2, 4), "pooled": (4,)}
TEACHER = {"stage1": (4, 4, 5), "stage2": (2, 2, 6), "pooled": (6,)}


def outputs(shapes, seed):
    rng = np.random.default_rng(seed)
    taps = {
        tap: jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)
        for tap, shape in shapes.items()
    }
    return Outputs(logits=jnp.zeros((2, 5)), taps=taps)


@pytest.fixture
def run(classification):
    return dataclasses.replace(
        classification,
        student=outputs(STUDENT, 0),
        teachers=(outputs(TEACHER, 1),),
    )


def start(run, method):
    """State of the method's shapes; compiling its own `init` takes seconds."""
    params, memory = jax.eval_shape(lambda: run.init(method))
    rng = np.random.default_rng(3)
    return (
        jax.tree.map(lambda x: jnp.float32(rng.uniform(-0.5, 0.5, x.shape)), params),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory),
    )


def step(run, method, state, **inputs):
    return jax.jit(method.terms)(*state, run.inputs(**inputs))


def test_fused_maps_and_pooled_vectors_are_compared(run):
    method = distill.create("reviewkd", warmup_epochs=0)
    state = start(run, method)
    values, memory = step(run, method, state)

    @jax.jit
    def expected(state, student, teacher):
        maps = [student["stage1"], student["stage2"], student["pooled"][:, None, None]]
        module = Review(4, (5, 6, 6), ((4, 4), (2, 2), (1, 1)))
        fused, memory = apply_module(module, *state, *maps, train=True)
        goals = [teacher["stage1"], teacher["stage2"], teacher["pooled"][:, None, None]]
        parts = map(losses.hierarchical_context, fused, goals)
        return sum(parts), memory

    value, statistics = expected(state, run.student.taps, run.teacher.taps)
    np.testing.assert_allclose(values["reviewkd"], value, rtol=1e-5)
    assert jax.tree.structure(memory) == jax.tree.structure(state[1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        memory,
        dict(statistics),
    )


def test_weight_rises_during_the_first_epochs(run):
    method = distill.create("reviewkd", warmup_epochs=4)
    state = start(run, method)
    terms = jax.jit(method.terms)
    values = [
        terms(*state, run.inputs(step=epoch))[0]["reviewkd"] for epoch in (0, 1, 3, 7)
    ]
    full = values[-1]
    np.testing.assert_allclose(values, np.outer([0.25, 0.5, 1, 1], full), rtol=1e-6)


def test_teacher_is_read_before_its_relu_where_it_can_be(run):
    def features(teacher, **options):
        other = dataclasses.replace(run, teachers=(teacher,))
        method = distill.create("reviewkd", **options)
        params, _ = jax.eval_shape(lambda: other.init(method))
        return [params[f"block{i}"]["conv2"]["kernel"].shape[-1] for i in (2, 1)]

    # Other widths than the stages have, so that the choice shows.
    before = {"stage1_pre": (4, 4, 7), "stage2_pre": (2, 2, 8)}
    with_both = outputs({**TEACHER, **before}, 1)
    assert features(run.teacher) == [5, 6]
    assert features(with_both) == [7, 8]
    assert features(with_both, teacher_taps=("stage1", "stage2")) == [5, 6]


def test_options_set_the_width_inside(run):
    def width(**options):
        method = distill.create("reviewkd", **options)
        params, _ = jax.eval_shape(lambda: run.init(method))
        return params["block0"]["conv1"]["kernel"].shape[-1]

    assert width() == 4
    assert width(mid_channels=9) == 9


def test_factor_is_the_weight():
    assert distill.create("reviewkd").weights == {"reviewkd": 5.0}
    assert distill.create("reviewkd", factor=1.0).weights == {"reviewkd": 1.0}


def test_needs_maps_and_pooled_vectors(run):
    tokens = outputs({**STUDENT, "stage2": (5, 4)}, 0)
    with pytest.raises(ValueError, match="'stage2' of network 'student' .* needs maps"):
        dataclasses.replace(run, student=tokens).init(distill.create("reviewkd"))
    bare = outputs({"stage1": (4, 4, 3), "stage2": (2, 2, 4)}, 0)
    with pytest.raises(ValueError, match="network 'student' has no tap 'pooled'"):
        dataclasses.replace(run, student=bare).init(distill.create("reviewkd"))
    with pytest.raises(ValueError, match="set student_taps and teacher_taps"):
        run.init(distill.create("reviewkd", student_taps=("stage1",)))


def test_checks_its_options():
    with pytest.raises(ValueError, match="warmup_epochs must be >= 0"):
        distill.create("reviewkd", warmup_epochs=-1)
    with pytest.raises(ValueError, match="mid_channels must be >= 1"):
        distill.create("reviewkd", mid_channels=0)
