import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses
from jaxkd.distill.transfers import Settings, Transfer, transfer_method
from jaxkd.layers import Outputs


def one_transfer(kind, student, teacher, *, part="prediction", **settings):
    transfer = Transfer(kind=kind, student=student, teacher=teacher, factor=0.5)
    term = "plfd" if part == "prediction" else "flfd"
    settings = Settings(**{"projection": "fixed", **settings})
    return transfer_method(
        "test", **{part: [transfer]}, weights={term: 1.0}, settings=settings
    )


@pytest.mark.parametrize(
    "kind, student, teacher",
    [
        ("individual", ("a", "b"), ("t",)),
        ("individual", ("a",), ()),
        ("unified", ("a", "b"), ("t",)),
        ("unified", ("a",), ()),
        ("concatenated", (), ("t",)),
        ("concatenated", ("a",), ("t", "u")),
        ("itself", ("a",), ("t",)),
    ],
)
def test_transfers_of_a_wrong_number_of_taps_are_an_error(kind, student, teacher):
    with pytest.raises(ValueError, match=f"the {kind} transfer needs"):
        Transfer(kind=kind, student=student, teacher=teacher)


def test_two_transfers_may_not_share_a_projection():
    pair = [Transfer(student=("d4",), teacher=(tap,)) for tap in ("out", "d4")]
    with pytest.raises(ValueError, match="different student layers, got d4, d4"):
        transfer_method(
            "test", prediction=pair, weights={"plfd": 1.0}, settings=Settings()
        )


def test_importance_transfers_call_their_loss(segmentation):
    s, t = segmentation.student.taps, segmentation.teacher.taps
    cases = [
        (
            one_transfer("individual", ("e2",), ("e5",), part="importance"),
            losses.importance_map_distillation(s["e2"], t["e5"]),
        ),
        (
            one_transfer("unified", ("e1",), ("e2", "e3"), part="importance"),
            losses.unified_importance_map_distillation(s["e1"], [t["e2"], t["e3"]]),
        ),
        (
            one_transfer("concatenated", ("e1", "e2"), ("e5",), part="importance"),
            losses.concatenated_importance_map_distillation(
                [s["e1"], s["e2"]], t["e5"]
            ),
        ),
    ]
    for method, expected in cases:
        value = segmentation.terms(method)["flfd"]
        np.testing.assert_allclose(value, 0.5 * expected, rtol=1e-5)


@pytest.mark.parametrize(
    "kind, student, teacher, widths",
    [
        ("individual", ("d4",), ("out",), (4, 2)),
        ("unified", ("d5",), ("d5", "d4"), (6, 5)),
        ("concatenated", ("d5", "d4"), ("out",), (9, 2)),
        ("itself", ("d5",), (), (5, 5)),
    ],
)
def test_projections_fit_their_transfer(segmentation, kind, student, teacher, widths):
    method = one_transfer(kind, student, teacher)
    _, memory = segmentation.init(method)
    (projection,) = memory.values()
    assert projection["kernel"].shape == widths
    value = segmentation.terms(method)["plfd"]
    assert value.shape == (2,) and jnp.all(value > 0)


def test_prediction_transfers_call_their_loss(segmentation):
    s, t = segmentation.student.taps, segmentation.teacher.taps
    method = one_transfer("unified", ("d5",), ("d5", "d4"), pmd_norm="pixel")
    state = segmentation.init(method)
    projection = state[1]["d5"]
    expected = losses.unified_prediction_map_distillation(
        s["d5"],
        [t["d5"], t["d4"]],
        projection["kernel"],
        projection["bias"],
        norm="pixel",
    )
    value = segmentation.terms(method, state=state)["plfd"]
    np.testing.assert_allclose(value, 0.5 * expected, rtol=1e-5)


def test_transfer_to_itself_compares_the_student_with_its_projection(segmentation):
    method = one_transfer("itself", ("d5",), ())
    state = segmentation.init(method)
    projection, x = state[1]["d5"], segmentation.student.taps["d5"]
    projected = x @ projection["kernel"] + projection["bias"][None, None, None]
    expected = losses.prediction_map_divergence(projected, x)
    value = segmentation.terms(method, state=state)["plfd"]
    np.testing.assert_allclose(value, 0.5 * expected, rtol=1e-4)


def test_missing_taps_are_named(segmentation):
    with pytest.raises(KeyError, match="network 'student' has no tap 'd9'"):
        segmentation.init(one_transfer("individual", ("d9",), ("out",)))
    with pytest.raises(KeyError, match="network 'teacher' has no tap 'd9'"):
        segmentation.init(one_transfer("individual", ("d4",), ("d9",)))


def test_a_prediction_of_one_channel_is_an_error(segmentation):
    taps = {**segmentation.teacher.taps, "out": segmentation.teacher.logits[..., :1]}
    teacher = Outputs(logits=segmentation.teacher.logits, taps=taps)
    run = dataclasses.replace(segmentation, teachers=(teacher,))
    with pytest.raises(ValueError, match="'d4' compares maps of 1 channel"):
        run.init(one_transfer("individual", ("d4",), ("out",)))


def test_a_missing_teacher_is_an_error(segmentation):
    alone = dataclasses.replace(segmentation, teachers=())
    with pytest.raises(ValueError, match="the method needs a teacher"):
        alone.init(one_transfer("individual", ("d4",), ("out",)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"exponent": 3}, "exponent must be a positive even integer, got 3"),
        ({"exponent": 0}, "exponent must be a positive even integer, got 0"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0"),
        ({"projection": "frozen"}, "one of resample, fixed, learned, got 'frozen'"),
        ({"pmd_norm": "none"}, "pmd_norm must be one of code, pixel, got 'none'"),
    ],
)
def test_impossible_settings_are_an_error(options, message):
    defaults = {"exponent": 4, "temperature": 4.0}
    kinds = {"projection": "fixed", "pmd_norm": "code"}
    # Not through the constructor, whose types the tests check before the values.
    unchecked = types.SimpleNamespace(**defaults, **kinds)
    vars(unchecked).update(options)
    with pytest.raises(ValueError, match=message):
        Settings.__post_init__(unchecked)
