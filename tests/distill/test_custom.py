"""Methods from plain functions, named or given."""

import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.distill.custom import from_loss


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A user's module beside nothing of jaxkd."""
    (tmp_path / "mine_losses.py").write_text(
        textwrap.dedent(
            """
            import jax.numpy as jnp
            from jaxkd.distill import Method, no_state

            def absolute(student, teacher, *, scale=1.0):
                return scale * jnp.abs(student - teacher).mean(-1)

            def margin(student, labels):
                return student.max(-1) - jnp.take_along_axis(
                    student, labels[:, None], axis=-1)[:, 0]

            def without_student(teacher):
                return teacher.mean(-1)

            def unknown_input(student, pixels):
                return student.mean(-1)

            def doubled(*, power: float = 2.0):
                def terms(params, memory, inputs):
                    return {"doubled": (inputs.student.logits ** power).mean(-1)}, {}
                return Method(init=no_state, terms=terms, weights={"doubled": 1.0})

            def no_method():
                return 3
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "mine_losses"
    sys.modules.pop("mine_losses", None)


def test_a_named_loss_reads_logits_and_options(package, classification):
    method = from_loss("mine", loss=f"{package}:absolute", scale=2.0)
    value = classification.terms(method)["mine"]
    student, teacher = classification.student.logits, classification.teacher.logits
    np.testing.assert_allclose(value, 2 * jnp.abs(student - teacher).mean(-1))
    assert method.num_teachers == 1 and method.weights == {"mine": 1.0}


def test_a_loss_of_labels_needs_no_teacher(package, classification):
    method = from_loss("mine", loss=f"{package}:margin")
    assert method.num_teachers == 0
    assert classification.terms(method)["mine"].shape == (2,)


def test_a_loss_may_read_taps(segmentation):
    def difference(student, teacher):
        return jnp.mean((student - teacher) ** 2, axis=(1, 2, 3))

    method = from_loss("maps", loss=difference, student_tap="e2", teacher_tap="e2")
    with pytest.raises(KeyError, match="no tap 'e9'"):
        segmentation.init(from_loss("m", loss=difference, student_tap="e9"))
    segmentation.init(method)


def test_options_of_a_loss_may_be_schedules(classification):
    method = from_loss("soft", loss=losses.kd, temperature=lambda step: 1.0 + step)
    value = classification.terms(method, step=2)["soft"]
    expected = losses.kd(
        classification.student.logits, classification.teacher.logits, temperature=3.0
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_no_gradient_reaches_the_teacher_of_a_users_loss(package, classification):
    method = from_loss("mine", loss=f"{package}:absolute")

    def total(teacher):
        inputs = classification.inputs().replace(teachers=(teacher,))
        return method.terms({}, {}, inputs)[0]["mine"].sum()

    grads = jax.grad(total)(classification.teacher)
    np.testing.assert_array_equal(grads.logits, 0)


def test_a_factory_of_ones_own_is_created_by_its_name(package, classification):
    method = distill.create(f"{package}:doubled", power=3.0)
    value = classification.terms(method)["doubled"]
    expected = (classification.student.logits**3).mean(-1)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "name, options, error, message",
    [
        ("mine_losses:doubled", {"powers": 3.0}, TypeError, "no option 'powers'"),
        ("mine_losses:dubled", {}, ValueError, "did you mean 'doubled'"),
        ("no_such_module:f", {}, ImportError, "cannot import 'no_such_module'"),
        ("mine_losses:no_method", {}, TypeError, "must return a jaxkd.distill.Method"),
    ],
)
def test_a_wrong_reference_is_one_line(package, name, options, error, message):
    with pytest.raises(error, match=message):
        distill.create(name, **options)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("without_student", {}, "must have a parameter 'student'"),
        ("unknown_input", {}, "'pixels' of 'unknown_input' is neither an option"),
        ("absolute", {"scales": 1.0}, "no option 'scales'"),
        ("margin", {"teacher_tap": "e1"}, "does not read the teacher"),
    ],
)
def test_a_loss_that_does_not_fit_is_one_line(package, name, options, message):
    with pytest.raises(TypeError, match=message):
        from_loss("mine", loss=f"{package}:{name}", **options)
