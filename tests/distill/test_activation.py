import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.layers import Outputs

STUDENT = {"stage1_pre": (4, 4, 3), "stage2_pre": (2, 2, 4)}
TEACHER = {"stage1_pre": (4, 4, 5), "stage2_pre": (2, 2, 6)}


def with_outputs(run, student=STUDENT, teacher=TEACHER):
    rng = np.random.default_rng(0)

    def outputs(shapes):
        taps, norms = {}, {}
        for name, shape in shapes.items():
            taps[name] = jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)
            taps[name.removesuffix("_pre")] = jax.nn.relu(taps[name])
            scale, bias = rng.standard_normal((2, shape[-1]))
            norms[name] = {
                "scale": jnp.asarray(scale, jnp.float32),
                "bias": jnp.asarray(bias, jnp.float32),
            }
        return Outputs(logits=jnp.zeros((2, 5)), taps=taps, norms=norms)

    return dataclasses.replace(
        run, student=outputs(student), teachers=(outputs(teacher),)
    )


@pytest.fixture
def run(classification):
    """Two stages of other channels."""
    return with_outputs(classification)


def connected(run, params, tap, connector):
    """The connector on one map of the student, written out."""
    x = run.student.taps[tap]
    y = jnp.einsum("bhwc,cd->bhwd", x, params[connector]["conv"]["kernel"][0, 0])
    mean, var = y.mean((0, 1, 2), keepdims=True), y.var((0, 1, 2), keepdims=True)
    norm = params[connector]["norm"]
    scale, bias = (norm[side].reshape(1, 1, 1, -1) for side in ("scale", "bias"))
    return (y - mean) / jnp.sqrt(var + 1e-5) * scale + bias


@pytest.mark.parametrize("name", ["ab", "ofd"])
def test_each_stage_has_a_connector_to_the_teachers_channels(run, name):
    params, memory = jax.eval_shape(lambda: run.init(distill.create(name)))
    assert jax.tree.map(jnp.shape, params) == {
        "connector1": {
            "conv": {"kernel": (1, 1, 3, 5)},
            "norm": {"scale": (5,), "bias": (5,)},
        },
        "connector2": {
            "conv": {"kernel": (1, 1, 4, 6)},
            "norm": {"scale": (6,), "bias": (6,)},
        },
    }
    statistics = memory["connector2"]["batch_stats"]["norm"]
    assert {k: v.shape for k, v in statistics.items()} == {"mean": (6,), "var": (6,)}


def test_connectors_start_with_the_published_variance(classification):
    wide = {"stage1_pre": (2, 2, 64)}
    run = with_outputs(classification, wide, {"stage1_pre": (2, 2, 256)})
    params, _ = run.init(distill.create("ofd"))
    kernel = params["connector1"]["conv"]["kernel"]
    np.testing.assert_allclose(jnp.std(kernel), np.sqrt(2 / 256), rtol=0.03)


def test_ab_weighs_each_stage_half_of_the_next(run):
    method = distill.create("ab", margin=0.5)
    assert method.weights == {"ab": 0.003}
    params, memory = run.init(method)
    stages = [
        losses.ab(connected(run, params, tap, name), run.teacher.taps[tap], margin=0.5)
        for tap, name in [("stage1_pre", "connector1"), ("stage2_pre", "connector2")]
    ]
    value = run.terms(method, state=(params, memory))["ab"]
    np.testing.assert_allclose(value, stages[0] / 2 + stages[1], rtol=1e-4)


def test_ofd_takes_its_margins_from_the_teachers_batch_norms(run):
    method = distill.create("ofd")
    assert method.weights == {"ofd": 0.001}
    params, memory = run.init(method)
    stages = []
    for tap, name in [("stage1_pre", "connector1"), ("stage2_pre", "connector2")]:
        margin = losses.ofd_margin(**run.teacher.norms[tap])
        student = connected(run, params, tap, name)
        stages.append(losses.ofd(student, run.teacher.taps[tap], margin))
    value = run.terms(method, state=(params, memory))["ofd"]
    np.testing.assert_allclose(value, stages[0] / 2 + stages[1], rtol=1e-4)


@pytest.mark.parametrize("name", ["ab", "ofd"])
def test_connectors_remember_batch_statistics_over_two_steps(run, name):
    method = distill.create(name)
    params, memory = run.init(method)
    kernel = params["connector1"]["conv"]["kernel"][0, 0]
    mean = (run.student.taps["stage1_pre"] @ kernel).mean((0, 1, 2))
    for kept in (0.9, 0.81):
        _, memory = run.step(method, state=(params, memory))
        found = memory["connector1"]["batch_stats"]["norm"]["mean"]
        np.testing.assert_allclose(found, (1 - kept) * mean, rtol=1e-3, atol=1e-6)


def test_ab_has_no_connector_where_none_is_needed(classification):
    run = with_outputs(classification, teacher=TEACHER | {"stage1_pre": (4, 4, 3)})
    method = distill.create(
        "ab",
        connector="where_needed",
        student_taps=("stage1_pre",),
        teacher_taps=("stage1_pre",),
    )
    assert run.init(method) == ({}, {})
    tap = "stage1_pre"
    expected = losses.ab(run.student.taps[tap], run.teacher.taps[tap])
    np.testing.assert_allclose(run.terms(method)["ab"], expected, rtol=1e-6)
    both = distill.create("ab", connector="where_needed")
    assert list(run.init(both)[0]) == ["connector2"]
    assert run.terms(both)["ab"].shape == (2,)


@pytest.mark.parametrize("name", ["ab", "ofd"])
@pytest.mark.parametrize("size", [(2, 2), (8, 8)])
def test_maps_of_other_sizes_are_averaged(classification, name, size):
    run = with_outputs(classification, teacher=TEACHER | {"stage1_pre": (*size, 5)})
    method = distill.create(
        name, student_taps=("stage1_pre",), teacher_taps=("stage1_pre",)
    )
    params, memory = run.init(method)
    value = run.terms(method, state=(params, memory))[name]
    student = connected(run, params, "stage1_pre", "connector1")
    teacher = run.teacher.taps["stage1_pre"]
    if size == (8, 8):
        teacher = teacher.reshape(2, 4, 2, 4, 2, 5).mean((2, 4))
    if name == "ofd":
        margin = losses.ofd_margin(**run.teacher.norms["stage1_pre"])
        np.testing.assert_allclose(
            value, losses.ofd(student, teacher, margin), rtol=1e-4
        )
    elif size == (8, 8):
        np.testing.assert_allclose(value, losses.ab(student, teacher), rtol=1e-4)
    else:
        # Here it is the student that is averaged, before its connector.
        taps = run.student.taps | {
            "stage1_pre": run.student.taps["stage1_pre"]
            .reshape(2, 2, 2, 2, 2, 3)
            .mean((2, 4))
        }
        small = dataclasses.replace(run, student=run.student.replace(taps=taps))
        student = connected(small, params, "stage1_pre", "connector1")
        np.testing.assert_allclose(value, losses.ab(student, teacher), rtol=1e-4)


def test_ofd_without_the_teachers_batch_norm_is_one_line(run):
    teacher = run.teacher.replace(norms={"stage1_pre": run.teacher.norms["stage1_pre"]})
    run = dataclasses.replace(run, teachers=(teacher,))
    message = (
        "batch norm of tap 'stage2_pre', which network 'teacher' does not give; it "
        "gives those of stage1_pre"
    )
    with pytest.raises(ValueError, match=message):
        run.init(distill.create("ofd"))


@pytest.mark.parametrize("name", ["ab", "ofd"])
def test_a_student_without_values_before_its_relu_is_one_line(run, name):
    taps = {k: v for k, v in run.student.taps.items() if not k.endswith("_pre")}
    run = dataclasses.replace(run, student=run.student.replace(taps=taps))
    with pytest.raises(ValueError, match="network 'student' has no tap 'stage1_pre'"):
        run.init(distill.create(name))


def test_ab_needs_a_margin():
    with pytest.raises(ValueError, match=r"margin must be > 0, got -1.0"):
        distill.create("ab", margin=-1.0)
    with pytest.raises(TypeError, match="'connector' must be one of 'always'"):
        distill.create("ab", connector="never")
