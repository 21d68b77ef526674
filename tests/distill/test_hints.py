import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.distill.modules import apply_module
from jaxkd.layers import Outputs
from jaxkd.layers.connectors import HintRegressor, VariationalRegressor, shrink_to

STUDENT = {"stage1": (8, 8, 3), "stage2": (4, 4, 4), "pooled": (4,)}
TEACHER = {"stage1": (8, 8, 5), "stage2": (2, 2, 6), "pooled": (6,)}


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


def with_taps(network, **shapes):
    """The network's outputs with other taps."""
    return outputs(shapes, 4).replace(logits=network.logits)


def test_hint_compares_the_last_stages(run):
    method = distill.create("hint")
    params, memory = start(run, method)
    values, _ = step(run, method, (params, memory))
    pooled = np.float64(shrink_to(run.student.taps["stage2"], (2, 2)))
    layer = jax.tree.map(np.float64, params["project"])
    matched = pooled @ layer["kernel"] + layer["bias"]
    difference = matched - np.float64(run.teacher.taps["stage2"])
    np.testing.assert_allclose(
        values["hint"], (difference**2).mean((1, 2, 3)), rtol=1e-4
    )


def test_hint_takes_vectors(run):
    method = distill.create("hint", student_tap="pooled", teacher_tap="pooled")
    params, memory = jax.eval_shape(lambda: run.init(method))
    assert params["project"]["kernel"].shape == (4, 6)
    assert memory == {}


def test_hint_trains_a_layer_between_equal_widths_only_if_asked(run):
    same = dataclasses.replace(run, teachers=(run.student,))
    assert same.init(distill.create("hint")) == ({}, {})
    assert same.terms(distill.create("hint"))["hint"].tolist() == [0.0, 0.0]
    params, _ = jax.eval_shape(
        lambda: same.init(distill.create("hint", always_project=True))
    )
    assert params["project"]["kernel"].shape == (4, 4)


def test_hint_refuses_a_vector_and_a_map(run):
    with pytest.raises(ValueError, match="'pooled' of network 'student' .* vector"):
        run.init(distill.create("hint", student_tap="pooled"))


def test_factors_are_the_weights_of_the_terms():
    def halved(step):
        return 0.5

    assert distill.create("hint").weights == {"hint": 1.0}
    assert distill.create("fitnet").weights == {"fitnet": 100.0}
    assert distill.create("vid").weights == {"vid": 1.0}
    for name in ("hint", "fitnet", "vid"):
        assert distill.create(name, factor=halved).weights == {name: halved}


def test_fitnet_is_the_hint_after_the_regressor(run):
    method = distill.create("fitnet")
    state = start(run, method)
    values, memory = step(run, method, state)
    regressed, expected = apply_module(
        HintRegressor(6, (2, 2)), *state, run.student.taps["stage2"], train=True
    )
    np.testing.assert_allclose(
        values["fitnet"],
        losses.hint(regressed, run.teacher.taps["stage2"]),
        rtol=1e-5,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        memory,
        dict(expected),
    )
    again, _ = step(run, method, (state[0], memory))
    np.testing.assert_allclose(again["fitnet"], values["fitnet"], rtol=1e-5)


def test_fitnet_only_doubles_maps(run):
    small = dataclasses.replace(run, student=with_taps(run.student, stage2=(3, 3, 4)))
    large = dataclasses.replace(
        small, teachers=(with_taps(run.teacher, stage2=(7, 7, 6)),)
    )
    message = r"'stage2' of network 'student' has shape \(3, 3, 4\) .*enlarges maps by"
    with pytest.raises(ValueError, match=message):
        large.init(distill.create("fitnet"))


def test_fitnet_names_a_tap_that_is_missing_or_no_map(run):
    with pytest.raises(KeyError, match="'teacher' has no tap 'stage3'; it has stage1"):
        run.init(distill.create("fitnet", teacher_tap="stage3"))
    with pytest.raises(ValueError, match="'pooled' .* needs maps"):
        run.init(distill.create("fitnet", student_tap="pooled"))


def test_vid_sums_the_stages(run):
    method = distill.create("vid")
    params, memory = start(run, method)
    values, _ = step(run, method, (params, memory))
    expected = 0.0
    for i, tap in enumerate(("stage1", "stage2")):
        teacher = run.teacher.taps[tap]
        pooled = shrink_to(run.student.taps[tap], teacher.shape[1:3])
        (mean, log_scale), _ = apply_module(
            VariationalRegressor(teacher.shape[-1]),
            params[f"pair{i}"],
            {},
            pooled,
            train=True,
        )
        expected += losses.vid(mean, teacher, log_scale)
    np.testing.assert_allclose(values["vid"], expected, rtol=1e-5)


def test_vid_pools_the_teacher_where_it_is_larger(run):
    method = distill.create("vid", student_taps=("stage2",), teacher_taps=("stage1",))
    state = start(run, method)
    values, _ = step(run, method, state)
    pooled = shrink_to(run.teacher.taps["stage1"], (4, 4))
    teacher = run.teacher.replace(taps={**run.teacher.taps, "stage1": pooled})
    other = dataclasses.replace(run, teachers=(teacher,))
    np.testing.assert_allclose(
        values["vid"], step(other, method, state)[0]["vid"], rtol=1e-5
    )


@pytest.mark.parametrize("train_variance", [True, False])
def test_vid_trains_variances_unless_told_otherwise(run, train_variance):
    method = distill.create("vid", train_variance=train_variance)
    params, memory = jax.eval_shape(lambda: run.init(method))
    assert ("log_scale" in params["pair0"]) == train_variance
    assert ("constants" in memory["pair0"]) != train_variance
    state = start(run, method)
    _, after = step(run, method, state)
    jax.tree.map(np.testing.assert_array_equal, after, state[1])


def test_vid_checks_its_options():
    with pytest.raises(ValueError, match="epsilon must be > 0"):
        distill.create("vid", epsilon=0.0)
    with pytest.raises(ValueError, match="initial_variance must be above epsilon"):
        distill.create("vid", initial_variance=1e-6)


def test_vid_pairs_as_many_stages(run):
    with pytest.raises(ValueError, match="student 'student' has 1 taps"):
        run.init(distill.create("vid", student_taps=("stage2",)))
