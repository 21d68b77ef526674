import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.layers import Outputs

CREATE = {"student_tap": "feat", "wide_tap": "feat"}


def normal(seed, *shape):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def network(seed, channels):
    def outputs(seed, batch):
        taps = {"feat": normal(seed + 50, batch, 8, 8, channels)}
        return Outputs(logits=normal(seed, batch, 8, 8, 3), taps=taps)

    views = {
        view: outputs(seed + i, 3)
        for i, view in enumerate(("unlabelled_a", "unlabelled_b", "mixed"), start=1)
    }
    return outputs(seed, 2).replace(views=views)


@pytest.fixture
def run(segmentation):
    """Two labelled images and three mixed ones."""
    method = distill.create("mgd_ssss")
    label = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 8, 8)), jnp.int32)
    batch = {
        "label": label.at[1, :2].set(255),
        "unlabelled_image": normal(0, 6, 8, 8, 1),
    }
    return dataclasses.replace(
        segmentation,
        student=network(100, 4),
        teachers=(network(200, 5), network(300, 6)),
        batch=method.prepare(batch, jax.random.key(9)),
    )


def test_prepare_mixes_two_unlabelled_batches(run):
    batch = run.batch
    first, second = jnp.split(batch["unlabelled_image"], 2)
    np.testing.assert_array_equal(batch["image_unlabelled_a"], first)
    np.testing.assert_array_equal(batch["image_unlabelled_b"], second)
    mask = batch["mixed_mask"]
    assert mask.shape == (3, 8, 8, 1)
    np.testing.assert_array_equal(
        batch["image_mixed"], first * (1 - mask) + second * mask
    )
    assert 0 < mask.mean() < 1


def test_terms_equal_the_losses(run):
    terms = run.terms(distill.create("mgd_ssss", **CREATE, sem_reduction="mean"))
    student, wide, deep = run.student, *run.teachers
    mask = run.batch["mixed_mask"]

    def entropy(logits, labels):
        return losses.labelled_cross_entropy(logits, labels)

    def pseudo(net):
        a, b = net.views["unlabelled_a"].logits, net.views["unlabelled_b"].logits
        return jnp.argmax(a * (1 - mask) + b * mask, axis=-1)

    mixed = student.views["mixed"]
    expected = {
        "supervised": entropy(student.logits, run.batch["label"]),
        "unlabelled": entropy(mixed.logits, pseudo(wide))
        + entropy(mixed.logits, pseudo(deep)),
        "labelled": entropy(student.logits, jnp.argmax(wide.logits, -1))
        + entropy(student.logits, jnp.argmax(deep.logits, -1)),
        "semantic": losses.semantic_consistency(
            mixed.logits, deep.views["mixed"].logits, reduction="mean"
        ),
        "content": losses.content_consistency(
            mixed.taps["feat"], wide.views["mixed"].taps["feat"]
        ),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)


def test_reported_terms_of_the_teachers_train_nothing(run):
    method = distill.create("mgd_ssss", **CREATE, teacher_terms=True)
    names = method.weights.keys() - distill.create("mgd_ssss").weights.keys()
    assert names == {
        "wide_supervised",
        "deep_supervised",
        "teachers_unlabelled",
        "teachers_labelled",
    }

    def total(student, teachers):
        inputs = run.inputs().replace(student=student, teachers=teachers)
        terms, _ = method.terms({}, {}, inputs)
        return sum(jnp.mean(terms[name]) for name in names)

    value, grads = jax.jit(jax.value_and_grad(total, (0, 1)))(run.student, run.teachers)
    assert value > 0
    assert not any(jnp.any(g != 0) for g in jax.tree.leaves(grads))


def test_what_the_plan_reads():
    method = distill.create("mgd_ssss")
    assert method.num_teachers == 2
    assert method.views == ("unlabelled_a", "unlabelled_b", "mixed")
    assert method.teacher_mode == "train"
    assert distill.create("mgd_ssss", teacher_bn="eval").teacher_mode == "eval"
    assert (method.weights["semantic"], method.weights["content"]) == (0.002, 100.0)


def test_errors_are_one_line(run):
    method = distill.create("mgd_ssss", **CREATE)
    with pytest.raises(ValueError, match=r"needs batch\['unlabelled_image'\]"):
        method.prepare({"image": jnp.zeros((2, 8, 8, 1))}, jax.random.key(0))
    with pytest.raises(ValueError, match="in pairs; the batch has 3"):
        batch = {"unlabelled_image": jnp.zeros((3, 8, 8, 1))}
        method.prepare(batch, jax.random.key(0))
    one = dataclasses.replace(run, teachers=run.teachers[:1])
    with pytest.raises(ValueError, match="needs two teachers, .* the stage has 1"):
        one.init(method)
    with pytest.raises(KeyError, match="network 'student' has no tap 'd2'"):
        run.init(distill.create("mgd_ssss"))
    with pytest.raises(ValueError, match="boxes must be >= 1"):
        distill.create("mgd_ssss", boxes=0)
    small = {**run.batch, "mixed_mask": jnp.zeros((3, 4, 4, 1))}
    with pytest.raises(ValueError, match=r"logits \(8, 8\) must have the size of the"):
        dataclasses.replace(run, batch=small).terms(method)
