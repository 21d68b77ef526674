"""Early classifiers inside one network, and networks that learn together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.distill.peers import EarlyClassifier
from jaxkd.layers import Outputs


@pytest.fixture
def staged(classification):
    """A student of three stages with odd sizes."""
    rng = np.random.default_rng(0)
    shapes = {"stage1": (7, 9, 3), "stage2": (4, 5, 4), "stage3": (2, 3, 6)}
    taps = {
        tap: jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)
        for tap, shape in shapes.items()
    }
    taps["pooled"] = taps["stage3"].mean((1, 2))
    student = classification.student.replace(taps=taps)
    return dataclasses.replace(classification, student=student, teachers=())


@pytest.fixture
def three(classification):
    """Three students, and no teacher."""
    rng = np.random.default_rng(1)
    peers = tuple(
        Outputs(logits=jnp.asarray(rng.standard_normal((2, 5)), jnp.float32), taps={})
        for _ in range(2)
    )
    student = classification.student.replace(peers=peers)
    return dataclasses.replace(classification, student=student, teachers=())


def test_byot_gives_every_stage_but_the_last_a_classifier(staged):
    params, memory = staged.init(distill.create("byot"))
    assert params.keys() == memory.keys() == {"stage1", "stage2"}
    kernels = {
        tap: [params[tap][f"conv{i}"]["kernel"].shape for i in range(3)]
        for tap in params
    }
    # 7 x 9 comes down to 2 x 3 by a 3 x 3 window of stride 3, 4 x 5 by 2 x 1.
    assert kernels["stage1"] == [(1, 1, 3, 1), (3, 3, 1, 1), (1, 1, 1, 6)]
    assert kernels["stage2"] == [(1, 1, 4, 1), (2, 1, 1, 1), (1, 1, 1, 6)]
    assert params["stage1"]["classifier"]["kernel"].shape == (6, 5)


def test_byot_is_the_sum_over_its_classifiers(staged):
    method = distill.create("byot", alpha=0.2, beta=0.5, temperature=2.0)
    assert method.weights == pytest.approx({"ce": 0.8, "kd": 0.2, "feature": 0.5})
    params, memory = staged.init(method)
    terms, _ = staged.step(method, state=(params, memory))
    labels, final = staged.batch["label"], staged.student.logits
    expected = {"ce": losses.cross_entropy(final, labels), "kd": 0.0, "feature": 0.0}
    for tap, window in {"stage1": (3, 3), "stage2": (2, 1)}.items():
        module = EarlyClassifier(features=6, classes=5, window=window)
        (logits, features), _ = module.apply(
            {"params": params[tap], **memory[tap]},
            staged.student.taps[tap],
            True,
            mutable=["batch_stats"],
        )
        expected["ce"] += losses.cross_entropy(logits, labels)
        expected["kd"] += losses.kd_cross_entropy(logits, final, temperature=2.0)
        expected["feature"] += losses.byot_feature(
            features, staged.student.taps["pooled"]
        )
    for name, value in terms.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4)


def test_byots_own_classifier_learns_from_the_labels_alone(staged):
    method = distill.create("byot")
    params, memory = staged.init(method)

    def total(student, name):
        inputs = staged.inputs(student=student)
        return method.terms(params, memory, inputs)[0][name].sum()

    for name in ("kd", "feature"):
        gradient = jax.grad(total)(staged.student, name)
        np.testing.assert_array_equal(gradient.logits, 0)
        np.testing.assert_array_equal(gradient.taps["pooled"], 0)
        assert jnp.any(gradient.taps["stage1"] != 0)
    assert jnp.any(jax.grad(total)(staged.student, "ce").logits != 0)


def test_byot_remembers_the_statistics_of_its_batch_norms(staged):
    method = distill.create("byot")
    params, memory = staged.init(method)
    _, after = staged.step(method, state=(params, memory))
    _, later = staged.step(method, state=(params, after))
    for old, new in ((memory, after), (after, later)):
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert a.shape == b.shape and jnp.any(a != b)


def test_byot_of_chosen_taps(staged):
    method = distill.create("byot", student_taps=("stage3",), final_tap="pooled")
    params, _ = staged.init(method)
    assert params.keys() == {"stage3"}
    assert params["stage3"]["conv1"]["kernel"].shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("options", "drop", "error", "message"),
    [
        ({}, ("stage2", "stage1"), ValueError, "stages before the last one"),
        ({}, ("pooled",), ValueError, "no tap 'pooled'; set final_tap"),
        ({"final_tap": "stage3"}, (), ValueError, "set final_tap to"),
        ({"student_taps": ("stage8",)}, (), KeyError, "no tap 'stage8'"),
        ({"student_taps": ("pooled",)}, (), ValueError, "this method needs maps"),
    ],
)
def test_byot_names_what_is_missing(staged, options, drop, error, message):
    taps = {k: v for k, v in staged.student.taps.items() if k not in drop}
    run = dataclasses.replace(staged, student=staged.student.replace(taps=taps))
    with pytest.raises(error, match=message):
        run.init(distill.create("byot", **options))


@pytest.mark.parametrize(("reduction", "divisor"), [("mean", 2), ("sum", 1)])
def test_dml_sums_over_students_and_reduces_over_peers(three, reduction, divisor):
    method = distill.create("dml", students=3, reduction=reduction)
    assert method.num_students == 3
    assert method.weights == {"ce": 1.0, "kl": 1.0}
    assert three.init(method) == ({}, {})
    terms = three.terms(method)
    logits = [o.logits for o in (three.student, *three.student.peers)]
    labels = three.batch["label"]
    ce = sum(losses.cross_entropy(z, labels) for z in logits)
    kl = sum(
        losses.kd(a, b, temperature=1.0) for a in logits for b in logits if a is not b
    )
    np.testing.assert_allclose(terms["ce"], ce, rtol=1e-6)
    np.testing.assert_allclose(terms["kl"], kl / divisor, rtol=1e-5)


def test_every_student_has_the_gradient_of_its_own_loss(three):
    method = distill.create("dml", students=3, reduction="mean", eps=0.0)

    def total(student):
        terms = three.terms(method, student=student)
        return (terms["ce"] + terms["kl"]).sum()

    gradient = jax.grad(total)(three.student)
    everyone = (three.student, *three.student.peers)
    for i, got in enumerate((gradient, *gradient.peers)):
        others = [o.logits for j, o in enumerate(everyone) if j != i]

        def own(z, others=others):
            ce = losses.cross_entropy(z, three.batch["label"])
            return (ce + sum(losses.dml(z, peer) for peer in others) / 2).sum()

        np.testing.assert_allclose(
            got.logits, jax.grad(own)(everyone[i].logits), rtol=1e-5, atol=1e-7
        )


def test_dml_names_networks_that_do_not_fit(three):
    with pytest.raises(ValueError, match="students=2 but the stage has 3"):
        three.init(distill.create("dml"))
    wide = Outputs(logits=jnp.zeros((2, 7)), taps={})
    student = three.student.replace(peers=(wide,))
    with pytest.raises(ValueError, match="have 7 classes"):
        dataclasses.replace(three, student=student).init(distill.create("dml"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dml", {"students": 1}, "students must be >= 2, got 1"),
        ("dml", {"eps": -1.0}, "eps must be >= 0"),
        ("byot", {"alpha": 2.0}, "alpha must be between 0 and 1"),
        ("byot", {"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_impossible_options_are_an_error(name, options, message):
    with pytest.raises(ValueError, match=message):
        distill.create(name, **options)
