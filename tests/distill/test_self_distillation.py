"""Methods in which a network teaches itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.layers import Outputs


@pytest.fixture
def run(classification):
    """A student of three stages, whose records have the numbers 3 and 1."""
    rng = np.random.default_rng(0)
    taps = {
        f"stage{i}": jnp.asarray(rng.standard_normal((2, 4, 4, 3 + i)), jnp.float32)
        for i in (1, 2, 3)
    }
    return dataclasses.replace(
        classification,
        student=classification.student.replace(taps=taps),
        batch={**classification.batch, "index": jnp.array([3, 1], jnp.int32)},
        data=dataclasses.replace(classification.data, records=4),
    )


def soft(run):
    target = jnp.array([[0.1, 0.2, 0.4, 0.3, 0.0], [0.6, 0.0, 0.0, 0.1, 0.3]])
    return dataclasses.replace(run, batch={**run.batch, "target": target})


def weak_logits(params, features):
    return features @ params["weak"]["kernel"] + params["weak"]["bias"][None]


def test_uskd_is_its_three_losses(run):
    method = distill.create("uskd", alpha=0.1, beta=0.2, mu=0.3, rank="prob")
    params, memory = run.init(method)
    assert memory == {}
    assert method.weights == {"target": 0.1, "nontarget": 0.2, "weak": 0.3}
    assert method.num_teachers == 0
    for one in (run, soft(run)):
        labels = one.batch.get("target", one.batch["label"])
        logits = one.student.logits
        weak = weak_logits(params, one.student.taps["stage2"].mean((1, 2)))
        terms = one.terms(method, state=(params, memory))
        expected = {
            "target": losses.uskd_target(logits, labels),
            "nontarget": losses.uskd_nontarget(logits, weak, labels, rank="prob"),
            "weak": losses.uskd_weak(weak, labels),
        }
        assert terms.keys() == expected.keys()
        for name, value in terms.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5)


def test_only_the_weak_heads_loss_trains_the_head_and_reaches_the_tap(run):
    method = distill.create("uskd")
    params, memory = run.init(method)

    def gradient(term):
        def total(params, student):
            inputs = run.inputs(student=student)
            return method.terms(params, memory, inputs)[0][term].sum()

        grads = jax.grad(total, (0, 1))(params, run.student)
        leaves = jax.tree.leaves((grads[0], grads[1].taps))
        return any(bool(jnp.any(x != 0)) for x in leaves)

    assert gradient("weak")
    assert not gradient("target")
    assert not gradient("nontarget")


@pytest.mark.parametrize(
    ("taps", "expected"),
    [
        ({"stage1": (4, 4, 3), "stage2": (2, 2, 6), "stage3": (1, 1, 8)}, (6, 5)),
        ({f"stage{i}": (9, 2 + i) for i in range(1, 13)}, (8, 5)),
        ({"stage1": (7,), "stage2": (8,)}, (7, 5)),
    ],
)
def test_the_weak_head_sits_before_the_last_stage_or_at_half_the_depth(
    run, taps, expected
):
    student = run.student.replace(taps={k: jnp.ones((2, *v)) for k, v in taps.items()})
    other = dataclasses.replace(run, student=student)
    params, _ = other.init(distill.create("uskd"))
    assert params["weak"]["kernel"].shape == expected
    other.terms(distill.create("uskd"))


def test_of_tokens_the_class_token_is_read(run):
    tokens = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 3)), jnp.float32)
    method = distill.create("uskd", student_tap="tokens")
    student = run.student.replace(taps={"tokens": tokens})
    other = dataclasses.replace(run, student=student)
    params, _ = other.init(method)
    expected = losses.uskd_weak(weak_logits(params, tokens[:, 0]), run.batch["label"])
    np.testing.assert_allclose(other.terms(method)["weak"], expected, rtol=1e-5)


def test_uskd_names_what_is_missing(run):
    alone = dataclasses.replace(run, student=run.student.replace(taps={}))
    with pytest.raises(ValueError, match="a stage before the last one"):
        alone.init(distill.create("uskd"))
    with pytest.raises(KeyError, match="no tap 'stage9'"):
        run.init(distill.create("uskd", student_tap="stage9"))


def test_pskd_learns_from_its_predictions_of_the_epoch_before(run):
    method = distill.create("pskd", alpha=0.6)
    state = run.init(method)
    first, memory = run.step(method, state=state, step=0)
    hard = losses.cross_entropy(run.student.logits, run.batch["label"])
    np.testing.assert_allclose(first["pskd"], hard, rtol=1e-6)
    np.testing.assert_array_equal(memory["seen"], [False, True, False, True])
    past = jax.nn.softmax(run.student.logits)
    np.testing.assert_allclose(memory["probabilities"][jnp.array([3, 1])], past)
    np.testing.assert_array_equal(memory["probabilities"][jnp.array([0, 2])], 0)

    # Epoch 4 of 10, counted from 0: a = 0.6 * 5 / 10.
    later = run.student.replace(logits=2 * run.student.logits)
    second, memory = run.step(method, state=({}, memory), student=later, step=4)
    expected = losses.pskd(later.logits, past, run.batch["label"], alpha=0.3)
    np.testing.assert_allclose(second["pskd"], expected, rtol=1e-6)
    np.testing.assert_allclose(
        memory["probabilities"][jnp.array([3, 1])], jax.nn.softmax(later.logits)
    )


def test_pskd_keeps_no_gradient_in_its_memory(run):
    method = distill.create("pskd")
    params, memory = run.init(method)

    def total(student):
        _, new = method.terms(params, memory, run.inputs(student=student))
        return new["probabilities"][:, 0].sum()

    np.testing.assert_array_equal(jax.grad(total)(run.student).logits, 0)


def test_pskd_mixes_soft_labels_too(run):
    mixed = soft(run)
    value = mixed.terms(distill.create("pskd"))["pskd"]
    expected = losses.cross_entropy(run.student.logits, mixed.batch["target"])
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_pskd_needs_a_row_per_record(run):
    _, memory = run.init(distill.create("pskd", records=9))
    assert memory["probabilities"].shape == (9, 5)
    with pytest.raises(ValueError, match="records is 3 but there are 4 training"):
        run.init(distill.create("pskd", records=3))


def test_tfkd_reg_is_its_two_losses(run):
    method = distill.create(
        "tfkd_reg", alpha=0.2, temperature=3.0, multiplier=7.0, correct_probability=0.8
    )
    assert method.weights == pytest.approx({"ce": 0.8, "tfkd_reg": 1.4})
    for one in (run, soft(run)):
        labels = one.batch.get("target", one.batch["label"])
        logits = one.student.logits
        terms = one.terms(method)
        np.testing.assert_allclose(terms["ce"], losses.cross_entropy(logits, labels))
        expected = losses.tfkd_regularization(
            logits, labels, correct_probability=0.8, temperature=3.0
        )
        np.testing.assert_allclose(terms["tfkd_reg"], expected)


def test_tfkd_self_is_its_two_losses(run):
    method = distill.create("tfkd_self", alpha=0.25, temperature=2.0, multiplier=4.0)
    assert method.weights == pytest.approx({"ce": 0.75, "tfkd_self": 1.0})
    assert method.num_teachers == 1
    terms = run.terms(method)
    logits, teacher = run.student.logits, run.teacher.logits
    expected = losses.tfkd_self(logits, teacher, temperature=2.0)
    np.testing.assert_allclose(terms["tfkd_self"], expected)
    labels = run.batch["label"]
    np.testing.assert_allclose(terms["ce"], losses.cross_entropy(logits, labels))


def test_weights_and_temperature_may_be_schedules(run):
    method = distill.create(
        "tfkd_self",
        alpha=lambda step: 0.1 * step,
        temperature=lambda step: 1.0 + step,
        multiplier=10.0,
    )
    step = jnp.asarray(3)
    at = {k: float(distill.weight_at(w, step)) for k, w in method.weights.items()}
    assert at == pytest.approx({"ce": 0.7, "tfkd_self": 3.0})
    value = run.terms(method, step=3)["tfkd_self"]
    expected = losses.tfkd_self(run.student.logits, run.teacher.logits, temperature=4.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_tfkd_self_names_classes_that_disagree(run):
    wide = Outputs(logits=jnp.zeros((2, 7)), taps={})
    other = dataclasses.replace(run, teachers=(wide,))
    with pytest.raises(ValueError, match="have 7 classes and student logits 5"):
        other.init(distill.create("tfkd_self"))


@pytest.mark.parametrize("name", ["uskd", "pskd", "tfkd_reg", "tfkd_self"])
def test_these_methods_label_images_not_pixels(segmentation, name):
    with pytest.raises(
        ValueError, match=f"method {name!r} needs logits .classes."
    ) as e:
        segmentation.init(distill.create(name))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pskd", {"alpha": 1.5}, "alpha must be between 0 and 1, got 1.5"),
        ("tfkd_reg", {"alpha": -0.1}, "alpha must be between 0 and 1"),
        ("tfkd_reg", {"temperature": 0.0}, "temperature must be > 0"),
        ("tfkd_reg", {"multiplier": 0.0}, "multiplier must be > 0"),
        ("tfkd_reg", {"correct_probability": 2.0}, "correct_probability must be"),
        ("tfkd_self", {"alpha": 1.1}, "alpha must be between 0 and 1"),
        ("tfkd_self", {"temperature": -1.0}, "temperature must be > 0"),
    ],
)
def test_impossible_options_are_an_error(name, options, message):
    with pytest.raises(ValueError, match=message):
        distill.create(name, **options)
