import dataclasses

import jax.numpy as jnp
import pytest

from jaxkd.distill import stages
from jaxkd.distill.stages import StageTaps
from jaxkd.layers import NetworkSpec, Outputs


@pytest.fixture
def run(classification):
    """A student and a teacher of two stages."""

    def outputs(channels):
        taps = {
            "stem": jnp.zeros((2, 4, 4, channels)),
            "stage1": jnp.ones((2, 4, 4, channels)),
            "stage1_pre": jnp.full((2, 4, 4, channels), 2.0),
            "stage2": jnp.full((2, 2, 2, channels), 3.0),
            "stage2_pre": jnp.full((2, 2, 2, channels), 4.0),
            "pooled": jnp.zeros((2, channels)),
        }
        return Outputs(logits=jnp.zeros((2, 5)), taps=taps)

    return dataclasses.replace(
        classification, student=outputs(3), teachers=(outputs(6),)
    )


@pytest.mark.parametrize(
    ("default", "names"),
    [
        (stages.stages, ("stage1", "stage2")),
        (stages.stem_and_stages, ("stem", "stage1", "stage2")),
        (stages.stages_before_relu, ("stage1_pre", "stage2_pre")),
    ],
)
def test_the_default_taps_are_checked_and_read(run, default, names):
    taps = StageTaps(student=None, teacher=None, default=default)
    assert taps.pairs(run.specs) == [(name, name) for name in names]
    for name, (s, t) in zip(names, taps.maps(run.inputs()), strict=True):
        assert s is run.student.taps[name]
        assert t is run.teacher.taps[name]


def test_the_user_chooses_for_one_network_or_both(run):
    taps = StageTaps(student=("stem", "stage2"), teacher=None)
    assert taps.pairs(run.specs) == [("stem", "stage1"), ("stage2", "stage2")]
    (s, t), _ = taps.maps(run.inputs())
    assert s is run.student.taps["stem"]
    assert t is run.teacher.taps["stage1"]


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (("stage1", "pooled"), None, ValueError, "'pooled' .* this method needs maps"),
        (None, ("stage1", "pooled"), ValueError, "'pooled' .* this method needs maps"),
        (("stage1",), None, ValueError, "student 'student' has 1 taps .* has 2"),
        (("stage1", "stage9"), None, KeyError, "'student' has no tap 'stage9'"),
        ((), None, ValueError, "student_taps must be a list of tap names"),
    ],
)
def test_impossible_taps_are_one_line(run, student, teacher, error, message):
    taps = StageTaps(student=student, teacher=teacher)
    with pytest.raises(error, match=message) as caught:
        taps.pairs(run.specs)
    assert "\n" not in str(caught.value)


def test_consecutive_layers_need_two_taps(run):
    taps = StageTaps(student=("stage1",), teacher=("stage1",))
    with pytest.raises(
        ValueError, match="at least 2 taps, got stage1; set student_taps"
    ):
        taps.pairs(run.specs, at_least=2)


@pytest.mark.parametrize("default", [stages.stages, stages.stem_and_stages])
def test_a_network_without_stages_asks_for_the_option(run, default):
    student = Outputs(logits=jnp.zeros((2, 5)), taps={"stem": jnp.zeros((2, 4, 4, 3))})
    run = dataclasses.replace(run, student=student)
    taps = StageTaps(student=None, teacher=None, default=default)
    with pytest.raises(ValueError, match="has no taps 'stage1', .* set student_taps"):
        taps.pairs(run.specs)


def test_stages_need_their_values_before_the_relu():
    spec = NetworkSpec(name="vit", logits=(5,), taps={"stage1": (4, 4, 3)})
    with pytest.raises(ValueError, match="'vit' has no tap 'stage1_pre'"):
        stages.stages_before_relu(spec)


def test_pairs_are_described_with_their_shapes(run):
    assert stages.describe_pair(run.specs, "stage2", "stem") == (
        "tap 'stage2' of student 'student' has shape (2, 2, 3) and tap 'stem' of "
        "teacher 'teacher' has (4, 4, 6)"
    )
