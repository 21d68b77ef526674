"""Compressed soft labels against numbers written out, and their recovery."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.numerics import compress_labels, kept_classes, recover_labels

P = np.array([0.1, 0.5, 0.05, 0.2, 0.15], np.float32)
FORMATS = ["ori", "hard", "smoothing", "marginal_smoothing_k2", "marginal_renorm_k3"]


@pytest.mark.parametrize(
    ("label_format", "index", "probability", "dense"),
    [
        ("ori", [0, 1, 2, 3, 4], P, P),
        ("hard", [1], [0.5], [0, 1, 0, 0, 0]),
        ("smoothing", [1], [0.5], [0.125, 0.5, 0.125, 0.125, 0.125]),
        ("marginal_smoothing_k2", [1, 3], [0.5, 0.2], [0.1, 0.5, 0.1, 0.2, 0.1]),
        (
            "marginal_renorm_k3",
            [1, 3, 4],
            [0.5, 0.2, 0.15],
            [0, 0.5 / 0.85, 0, 0.2 / 0.85, 0.15 / 0.85],
        ),
        ("marginal_renorm", [1, 3, 4, 0, 2], [0.5, 0.2, 0.15, 0.1, 0.05], P),
    ],
)
def test_every_format_by_hand(label_format, index, probability, dense):
    stored = compress_labels(jnp.asarray(P)[None], label_format=label_format)
    np.testing.assert_array_equal(stored[0], [index])
    np.testing.assert_allclose(stored[1], [probability], rtol=1e-6)
    assert stored[0].dtype == jnp.int32
    recovered = recover_labels(*stored, label_format=label_format, num_classes=5)
    np.testing.assert_allclose(recovered, [dense], rtol=1e-6)


@pytest.mark.parametrize("label_format", FORMATS)
def test_recovered_labels_sum_to_one_whatever_the_leading_axes(label_format):
    p = np.random.default_rng(0).dirichlet(np.ones(7), (2, 3)).astype(np.float32)
    stored = compress_labels(jnp.asarray(p), label_format=label_format)
    dense = recover_labels(*stored, label_format=label_format, num_classes=7)
    assert dense.shape == (2, 3, 7)
    np.testing.assert_allclose(dense.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(dense.argmax(-1), p.argmax(-1))


def test_of_equal_entries_the_lower_class_comes_first():
    stored, _ = compress_labels(
        jnp.full((1, 6), 1 / 6), label_format="marginal_smoothing_k3"
    )
    np.testing.assert_array_equal(stored, [[0, 1, 2]])


def test_a_rounded_sum_above_one_leaves_nothing_negative():
    index = jnp.array([[2, 0]])
    probability = jnp.array([[0.9, 0.1004]], jnp.float16)
    assert probability.astype(jnp.float32).sum() > 1
    dense = recover_labels(
        index, probability, label_format="marginal_smoothing_k2", num_classes=4
    )
    np.testing.assert_array_equal(dense[0, jnp.array([1, 3])], 0)


@pytest.mark.parametrize(
    ("label_format", "classes", "kept"),
    [
        ("ori", 7, 7),
        ("hard", 1, 1),
        ("smoothing", 2, 1),
        ("marginal_smoothing_k5", 6, 5),
        ("marginal_smoothing_k10", 1000, 10),
        ("marginal_renorm", 5, 5),
        ("marginal_renorm_k10", 10, 10),
    ],
)
def test_the_number_of_kept_classes(label_format, classes, kept):
    assert kept_classes(label_format, classes) == kept


@pytest.mark.parametrize(
    ("label_format", "classes", "needed"),
    [
        ("smoothing", 1, 2),
        ("marginal_smoothing_k5", 5, 6),
        ("marginal_smoothing_k10", 10, 11),
        ("marginal_renorm", 4, 5),
    ],
)
def test_too_few_classes_are_an_error(label_format, classes, needed):
    with pytest.raises(ValueError, match=f"at least {needed} classes, got {classes}"):
        kept_classes(label_format, classes)


@pytest.mark.parametrize("label_format", ["", "soft", "marginal_smoothing_k0", "k5"])
def test_unknown_formats_are_an_error(label_format):
    with pytest.raises(ValueError, match="label_format must be 'ori', 'hard'"):
        kept_classes(label_format, 100)


def test_arrays_of_another_format_are_an_error():
    stored = compress_labels(jnp.asarray(P)[None], label_format="marginal_smoothing_k2")
    with pytest.raises(ValueError, match=r"keeps 3 of 5 classes; got index \(1, 2\)"):
        recover_labels(*stored, label_format="marginal_renorm_k3", num_classes=5)
