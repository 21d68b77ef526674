"""Self-distillation losses against independent NumPy computations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxkd import losses


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    student, weak, other = 2 * rng.standard_normal((3, 6, 7))
    return {
        "student": jnp.asarray(student, jnp.float32),
        "weak": jnp.asarray(weak, jnp.float32),
        "other": jnp.asarray(other, jnp.float32),
        "labels": jnp.asarray(rng.integers(0, 7, 6), jnp.int32),
        "soft": jnp.asarray(rng.dirichlet(np.ones(7), 6), jnp.float32),
    }


def one_by_one_nontarget(student, weak, targets, *, rank):
    """USKD's non-target part of one example, by loops in float64."""
    lp = scipy.special.log_softmax(np.float64(student))
    s = lp if rank == "logprob" else np.exp(lp)
    w = scipy.special.softmax(np.float64(weak))
    r = w / (1 - sum(w[t] for t in targets) + 1e-6)
    r = r + s / (1 - sum(s[t] for t in targets) + 1e-6)
    zipf = {}
    for position, k in enumerate(sorted(range(len(r)), key=lambda k: -r[k])):
        if k not in targets:
            zipf[k] = 1 / (position + 1)
    total = sum(zipf.values())
    rest = scipy.special.log_softmax([np.float64(student)[k] for k in zipf])
    return -sum(q / total * p for q, p in zip(zipf.values(), rest, strict=True))


@pytest.mark.parametrize("rank", ["logprob", "prob"])
@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_uskd_nontarget_agrees_with_loops(arrays, rank, kind):
    labels = arrays[kind]
    values = losses.uskd_nontarget(arrays["student"], arrays["weak"], labels, rank=rank)
    for i, value in enumerate(values):
        label = np.asarray(labels[i])
        chosen = np.argsort(-label)[:2].tolist() if label.ndim else [int(label)]
        expected = one_by_one_nontarget(
            np.asarray(arrays["student"][i]),
            np.asarray(arrays["weak"][i]),
            chosen,
            rank=rank,
        )
        assert value == pytest.approx(expected, rel=1e-5)


def test_uskd_rankings_differ(arrays):
    args = arrays["student"], arrays["weak"], arrays["labels"]
    default = losses.uskd_nontarget(*args)
    assert jnp.any(default != losses.uskd_nontarget(*args, rank="prob"))


def test_uskd_ranks_ties_in_class_order():
    """Equal classes: positions 1 (the target), 2, 3, so weights 1/2 and 1/3."""
    student = jnp.zeros((1, 3))
    gradient = jax.grad(
        lambda z: losses.uskd_nontarget(z, jnp.zeros((1, 3)), jnp.array([0])).sum()
    )(student)
    np.testing.assert_allclose(gradient, [[0, 0.5 - 0.6, 0.5 - 0.4]], atol=1e-6)


@pytest.mark.parametrize(
    ("classes", "labels"), [(1, jnp.array([0])), (2, jnp.array([[0.7, 0.3]]))]
)
def test_uskd_without_other_classes_has_no_nontarget_part(classes, labels):
    def value(z):
        return losses.uskd_nontarget(z, jnp.ones((1, classes)), labels).sum()

    result, gradient = jax.value_and_grad(value)(jnp.full((1, classes), 2.0))
    assert result == 0
    np.testing.assert_array_equal(gradient, 0)


def test_uskd_leaves_out_classes_that_the_student_masks(arrays):
    kept = jnp.array([0, 1, 2, 4, 5, 6])
    labels = jnp.zeros(6, jnp.int32)
    weak = arrays["weak"].at[:, 3].set(-jnp.inf)
    masked = arrays["student"].at[:, 3].set(-jnp.inf)
    value, gradient = jax.value_and_grad(
        lambda z: losses.uskd_nontarget(z, weak, labels).sum()
    )(masked)
    expected = losses.uskd_nontarget(masked[:, kept], weak[:, kept], labels).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(gradient[:, 3], 0)


def test_uskd_target_by_numpy(arrays):
    p = scipy.special.softmax(np.float64(arrays["student"]), axis=-1)
    rows = np.arange(6)
    p_y = p[rows, np.asarray(arrays["labels"])]
    expected = -(p_y**2 + 1 - np.mean(p_y**2)) * np.log(p_y)
    value = losses.uskd_target(arrays["student"], arrays["labels"])
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_uskd_target_of_one_example_is_cross_entropy(arrays):
    student, labels = arrays["student"][:1], arrays["labels"][:1]
    np.testing.assert_allclose(
        losses.uskd_target(student, labels),
        losses.cross_entropy(student, labels),
        rtol=1e-6,
    )


def test_uskd_target_ignores_an_entry_of_zero(arrays):
    onehot = jax.nn.one_hot(arrays["labels"], 7)
    np.testing.assert_allclose(
        losses.uskd_target(arrays["student"], onehot),
        losses.uskd_target(arrays["student"], arrays["labels"]),
        rtol=1e-6,
    )


def test_uskd_weak_is_smoothed_by_a_tenth():
    value = losses.uskd_weak(jnp.array([[math.log(3), 0.0]]), jnp.array([0]))
    expected = -(0.95 * math.log(0.75) + 0.05 * math.log(0.25))
    np.testing.assert_allclose(value, [expected], rtol=1e-6)


def test_pskd_mixes_the_label_and_the_past():
    past = jnp.array([[0.2, 0.8]])
    targets = losses.pskd_targets(past, jnp.array([0]), alpha=0.25)
    np.testing.assert_allclose(targets, [[0.8, 0.2]], rtol=1e-6)
    value = losses.pskd(jnp.zeros((1, 2)), past, jnp.array([0]), alpha=0.25)
    np.testing.assert_allclose(value, [math.log(2)], rtol=1e-6)


def test_pskd_without_trust_is_cross_entropy(arrays):
    value = losses.pskd(arrays["student"], arrays["soft"], arrays["labels"], alpha=0.0)
    expected = losses.cross_entropy(arrays["student"], arrays["labels"])
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_pskd_alpha_is_a_share(arrays):
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 1.5"):
        losses.pskd_targets(arrays["soft"], arrays["labels"], alpha=1.5)


def test_tfkd_regularization_by_scipy(arrays):
    virtual = np.full((6, 7), 0.1 / 6)
    virtual[np.arange(6), np.asarray(arrays["labels"])] = 0.9
    q = scipy.special.softmax(virtual / 5.0, axis=-1)
    p = scipy.special.softmax(np.float64(arrays["student"]), axis=-1)
    value = losses.tfkd_regularization(
        arrays["student"], arrays["labels"], correct_probability=0.9, temperature=5.0
    )
    expected = scipy.special.rel_entr(q, p).mean(-1)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_tfkd_soft_labels_that_are_one_hot_are_labels(arrays):
    student, labels = arrays["student"], arrays["labels"]
    np.testing.assert_allclose(
        losses.tfkd_regularization(student, jax.nn.one_hot(labels, 7)),
        losses.tfkd_regularization(student, labels),
        rtol=1e-6,
    )


def test_tfkd_self_is_kd_averaged_over_classes(arrays):
    student, teacher = arrays["student"], arrays["other"]
    np.testing.assert_allclose(
        losses.tfkd_self(student, teacher, temperature=3.0),
        losses.kd(student, teacher, temperature=3.0) / 7,
        rtol=1e-6,
    )


def test_byot_feature_is_a_sum_where_either_is_positive():
    early = jnp.array([[1.0, -1.0, -2.0], [0.0, 0.0, 0.0]])
    final = jnp.array([[0.0, 2.0, -5.0], [0.0, 0.0, 3.0]])
    value = losses.byot_feature(early, final)
    np.testing.assert_allclose(value, [2 * (1 + 9), 2 * 9])
    assert jnp.mean(value) == 1 + 9 + 9


def test_dml_is_the_divergence_at_temperature_one(arrays):
    p, q = (
        scipy.special.softmax(np.float64(arrays[name]), axis=-1)
        for name in ("student", "other")
    )
    value = losses.dml(arrays["student"], arrays["other"])
    np.testing.assert_allclose(value, scipy.special.rel_entr(q, p).sum(-1), rtol=1e-5)
    close = losses.dml(arrays["student"], arrays["other"], eps=1e-8)
    np.testing.assert_allclose(close, value, rtol=1e-4)


def test_dml_of_the_code_bounds_the_loss_and_stops_the_gradient():
    """What `eps` costs: the student that is most wrong learns nothing."""
    student, peer = jnp.array([[100.0, 0.0]]), jnp.array([[0.0, 100.0]])

    def gradient(eps):
        return jax.grad(lambda z: losses.dml(z, peer, eps=eps).sum())(student)

    np.testing.assert_array_equal(gradient(1e-8), 0)
    np.testing.assert_allclose(gradient(0.0), [[1.0, -1.0]], rtol=1e-5)
    assert losses.dml(student, peer, eps=1e-8)[0] == pytest.approx(8 * math.log(10))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z, y: losses.uskd_target(z, y[:2]), r"need \(6,\)"),
        (lambda z, y: losses.uskd_nontarget(z, z[:, :2], y), "have 2 classes"),
        (lambda z, y: losses.uskd_weak(z, y[:2]), r"need \(6,\)"),
        (lambda z, y: losses.pskd(z, z[:, :2], y, alpha=0.5), "have 2 classes"),
        (lambda z, y: losses.tfkd_regularization(z, z[:, :2]), r"need \(6, 7\)"),
        (
            lambda z, y: losses.tfkd_regularization(z, y, correct_probability=2.0),
            "correct_probability must be between 0 and 1",
        ),
        (
            lambda z, y: losses.tfkd_regularization(z, y, where=jnp.ones(2, bool)),
            r"need \(6,\)",
        ),
        (lambda z, y: losses.byot_feature(z, z[:, :2]), "must be equal"),
        (lambda z, y: losses.dml(z, z, eps=-1.0), "eps must be >= 0, got -1"),
        (lambda z, y: losses.dml(z, z[:, :2]), "have 2 classes"),
    ],
)
def test_mistakes_are_one_line(arrays, function, message):
    with pytest.raises(ValueError, match=message) as error:
        function(arrays["student"], arrays["labels"])
    assert "\n" not in str(error.value)
