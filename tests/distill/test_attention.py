import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.layers import Outputs


@pytest.fixture
def run(classification):
    """Two stages; the teacher's second map is larger, its channels are others."""
    rng = np.random.default_rng(0)

    def outputs(**shapes):
        taps = {
            name: jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)
            for name, shape in shapes.items()
        }
        return Outputs(logits=jnp.zeros((2, 5)), taps=taps)

    return dataclasses.replace(
        classification,
        student=outputs(stem=(4, 4, 2), stage1=(4, 4, 3), stage2=(2, 2, 5)),
        teachers=(outputs(stage1=(4, 4, 4), stage2=(4, 4, 6)),),
    )


LOSSES = {
    "at": losses.attention_transfer,
    "nst": losses.neuron_selectivity_transfer,
}


@pytest.mark.parametrize(("name", "factor"), [("at", 1000.0), ("nst", 50.0)])
def test_term_is_the_sum_over_stages_and_the_weight_is_the_factor(run, name, factor):
    method = distill.create(name)
    assert method.weights == {name: factor}
    assert run.init(method) == ({}, {})
    s, t = run.student.taps, run.teacher.taps
    expected = sum(LOSSES[name](s[tap], t[tap]) for tap in ("stage1", "stage2"))
    np.testing.assert_allclose(run.terms(method)[name], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["at", "nst"])
def test_taps_and_factor_are_options(run, name):
    def decay(step):
        return 1.0 / step

    method = distill.create(
        name, factor=decay, student_taps=("stem",), teacher_taps=("stage2",)
    )
    assert method.weights[name](4) == 0.25
    expected = LOSSES[name](run.student.taps["stem"], run.teacher.taps["stage2"])
    np.testing.assert_allclose(run.terms(method)[name], expected, rtol=1e-6)


def test_at_hands_on_exponent_and_norm(run):
    method = distill.create(
        "at",
        exponent=4,
        norm="paper",
        student_taps=("stage1",),
        teacher_taps=("stage1",),
    )
    s, t = run.student.taps["stage1"], run.teacher.taps["stage1"]
    expected = losses.attention_transfer(s, t, exponent=4, norm="paper")
    np.testing.assert_allclose(run.terms(method)["at"], expected, rtol=1e-6)


def test_impossible_options_are_named():
    with pytest.raises(ValueError, match="exponent must be an integer above 0, got 0"):
        distill.create("at", exponent=0)
    with pytest.raises(TypeError, match="'norm' must be one of 'code', 'paper'"):
        distill.create("at", norm="sum")


@pytest.mark.parametrize("name", ["at", "nst"])
def test_networks_with_other_stages_are_an_error_before_any_array(run, name):
    method = distill.create(name, student_taps=("stem", "stage1", "stage2"))
    with pytest.raises(ValueError, match="set student_taps and teacher_taps"):
        run.init(method)
