import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.layers import Outputs

SHAPES = {"stem": (4, 4, 2), "stage1": (4, 4, 3), "stage2": (2, 2, 5)}


def with_outputs(run, student=SHAPES, teacher=SHAPES):
    rng = np.random.default_rng(0)

    def outputs(shapes):
        taps = {
            name: jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)
            for name, shape in shapes.items()
        }
        return Outputs(logits=jnp.zeros((2, 5)), taps=taps)

    return dataclasses.replace(
        run, student=outputs(student), teachers=(outputs(teacher),)
    )


def pairs(run, *names):
    s, t = run.student.taps, run.teacher.taps
    return [
        ((s[a], s[b]), (t[a], t[b])) for a, b in zip(names, names[1:], strict=False)
    ]


def test_fsp_sums_over_consecutive_layers_from_the_stem_on(classification):
    run = with_outputs(classification)
    method = distill.create("fsp")
    assert method.weights == {"fsp": 50.0}
    assert run.init(method) == ({}, {})
    expected = sum(losses.fsp(s, t) for s, t in pairs(run, "stem", "stage1", "stage2"))
    np.testing.assert_allclose(run.terms(method)["fsp"], expected, rtol=1e-6)


def test_fsp_takes_the_named_layers(classification):
    run = with_outputs(classification)
    taps = ("stage1", "stage2")
    method = distill.create("fsp", factor=2.0, student_taps=taps, teacher_taps=taps)
    assert method.weights == {"fsp": 2.0}
    ((s, t),) = pairs(run, *taps)
    np.testing.assert_allclose(run.terms(method)["fsp"], losses.fsp(s, t), rtol=1e-6)


def test_fsp_of_networks_of_other_widths_names_both_taps(classification):
    run = with_outputs(classification, teacher=SHAPES | {"stage1": (4, 4, 6)})
    message = (
        r"tap 'stage1' of student 'student' has shape \(4, 4, 3\) and tap 'stage1' of "
        r"teacher 'teacher' has \(4, 4, 6\); FSP needs equal channels"
    )
    with pytest.raises(ValueError, match=message):
        run.init(distill.create("fsp"))


def test_kdsvd_is_the_loss_over_all_stages(classification):
    teacher = SHAPES | {"stage1": (6, 4, 4), "stage2": (2, 2, 7)}
    run = with_outputs(classification, teacher=teacher)
    method = distill.create("kdsvd", vectors=2)
    assert method.weights == {"kdsvd": 1.0}
    assert run.init(method) == ({}, {})
    stages = ("stage1", "stage2")
    expected = losses.kdsvd(
        [run.student.taps[tap] for tap in stages],
        [run.teacher.taps[tap] for tap in stages],
        vectors=2,
    )
    np.testing.assert_allclose(run.terms(method)["kdsvd"], expected, rtol=1e-5)


def test_kdsvd_reads_pixels_by_channels_if_asked(classification):
    teacher = SHAPES | {"stage2": (3, 3, 5)}
    run = with_outputs(classification, teacher=teacher)
    method = distill.create("kdsvd", view="pixels", factor=3.0)
    assert method.weights == {"kdsvd": 3.0}
    run.init(method)
    stages = ("stage1", "stage2")
    expected = losses.kdsvd(
        [run.student.taps[tap] for tap in stages],
        [run.teacher.taps[tap] for tap in stages],
        view="pixels",
    )
    np.testing.assert_allclose(run.terms(method)["kdsvd"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "teacher", "message"),
    [
        ({}, {"stage1": (4, 5, 3)}, r"\(4, 5, 3\); KDSVD .*'rows' needs one width"),
        ({"view": "pixels"}, {"stage1": (4, 4, 6)}, "needs one number of channels"),
        ({"vectors": 3}, {}, "'stage2' .* have 2 singular vectors, .* asked for 3"),
        ({"vectors": 5, "view": "pixels"}, {}, "have 3 singular vectors"),
        ({"student_taps": ("stage1",), "teacher_taps": ("stage1",)}, {}, "at least 2"),
    ],
)
def test_what_kdsvd_cannot_compare_is_one_line(
    classification, options, teacher, message
):
    run = with_outputs(classification, teacher=SHAPES | teacher)
    with pytest.raises(ValueError, match=message) as caught:
        run.init(distill.create("kdsvd", **options))
    assert "\n" not in str(caught.value)


def test_kdsvd_needs_a_vector():
    with pytest.raises(ValueError, match="vectors must be > 0, got 0"):
        distill.create("kdsvd", vectors=0)
