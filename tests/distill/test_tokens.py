import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses


@pytest.fixture
def tokens(classification):
    """A student with two heads."""
    logits = classification.student.logits
    heads = {"cls_logits": 1.5 * logits, "dist_logits": 0.5 * logits[:, ::-1]}
    return dataclasses.replace(
        classification, student=classification.student.replace(taps=heads)
    )


def test_each_head_learns_from_its_own_teacher(tokens):
    method = distill.create("deit", alpha=0.3)
    np.testing.assert_allclose(
        [method.weights["ce"], method.weights["distillation"]], [0.7, 0.3]
    )
    terms = tokens.terms(method)
    heads = tokens.student.taps
    np.testing.assert_array_equal(
        terms["ce"], losses.cross_entropy(heads["cls_logits"], tokens.batch["label"])
    )
    decision = jnp.argmax(tokens.teacher.logits, axis=-1)
    np.testing.assert_array_equal(
        terms["distillation"], losses.cross_entropy(heads["dist_logits"], decision)
    )


def test_the_published_soft_form_is_kd_divided_by_the_classes(tokens):
    pair = tokens.student.taps["dist_logits"], tokens.teacher.logits
    expected = losses.kd(*pair, temperature=3.0)
    for norm, divisor in (("classes", 5), ("batch", 1)):
        method = distill.create(
            "deit", distillation="soft", temperature=3.0, soft_norm=norm
        )
        value = tokens.terms(method)["distillation"]
        np.testing.assert_allclose(value, expected / divisor, rtol=1e-6)


def test_the_class_head_learns_mixed_and_smoothed_labels(tokens):
    target = jnp.array([[0.0, 0.3, 0.0, 0.7, 0.0], [0.5, 0.0, 0.5, 0.0, 0.0]])
    mixed = dataclasses.replace(tokens, batch=tokens.batch | {"target": target})
    method = distill.create("deit", label_smoothing=0.1)
    expected = losses.cross_entropy(
        tokens.student.taps["cls_logits"], target, label_smoothing=0.1
    )
    np.testing.assert_array_equal(mixed.terms(method)["ce"], expected)


def test_a_scheduled_share_leaves_the_rest_to_the_labels():
    method = distill.create("deit", alpha=lambda step: 0.1 * step)
    step = jnp.asarray(3)
    shares = [distill.weight_at(w, step) for w in method.weights.values()]
    np.testing.assert_allclose(shares, [0.7, 0.3], rtol=1e-6)


def test_impossible_options_and_networks_are_one_line(tokens, classification):
    method = distill.create("deit")
    with pytest.raises(ValueError, match="'student' lacks the taps cls_logits, dist"):
        classification.init(method)
    teacher = tokens.teacher.replace(logits=jnp.zeros((2, 7)))
    with pytest.raises(ValueError, match=r"has logits of shape \(7,\) and the heads"):
        dataclasses.replace(tokens, teachers=(teacher,)).init(method)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 2"):
        distill.create("deit", alpha=2)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        distill.create("deit", temperature=0)
