"""Losses between dense predictions and features. See test_contract.py for columns."""

import functools

import jax.numpy as jnp
import numpy as np

from jaxkd import losses


def normal(*shape):
    return lambda rng, batch: rng.standard_normal((batch, *shape)).astype(np.float32)


def classes(count, *shape):
    return lambda rng, batch: rng.integers(0, count, (batch, *shape)).astype(np.int32)


INPUTS = {
    "dense": normal(4, 5, 3),
    "teacher_dense": normal(4, 5, 3),
    "teacher_deeper": normal(4, 5, 6),
    "teacher_coarser": normal(3, 3, 6),
    "dense_labels": classes(3, 8, 10),
    "dense_targets": classes(3, 4, 5),
}


def bank(entries, channels):
    rows = np.random.default_rng(4).standard_normal((entries, channels))
    return jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), jnp.float32)


def memory(student, teacher, **options):
    return losses.cirkd_memory(
        student, teacher, bank(7, 3), contrast_temperature=1.0, **options
    )


ifvd = functools.partial(losses.ifvd, num_classes=2)
pixel_mean = functools.partial(losses.skd_pixel, reduction="mean")
semantic_mean = functools.partial(losses.semantic_consistency, reduction="mean")
content = functools.partial(losses.content_consistency, regions=3)

LOSSES = [
    ("cwd", losses.cwd, "dense teacher_dense", "identity"),
    (
        "skd_pixel",
        losses.skd_pixel,
        "dense teacher_dense",
        "coupled pixels where shift",
    ),
    ("skd_pixel_mean", pixel_mean, "dense teacher_dense", "pixels where shift"),
    ("skd_pair", losses.skd_pair, "dense teacher_deeper", "detached"),
    ("skd_pair_same", losses.skd_pair, "dense teacher_dense", "identity detached"),
    ("ifvd", ifvd, "dense teacher_deeper dense_labels", "pixels"),
    ("ifvd_same", ifvd, "dense teacher_dense dense_labels", "identity pixels"),
    ("cirkd_minibatch", losses.cirkd_minibatch, "dense teacher_deeper", "coupled"),
    (
        "cirkd_minibatch_same",
        losses.cirkd_minibatch,
        "dense teacher_dense",
        "coupled",
    ),
    ("cirkd_memory", memory, "dense teacher_dense", "identity pixels where"),
    (
        "semantic_consistency",
        losses.semantic_consistency,
        "dense teacher_dense",
        "coupled identity",
    ),
    ("semantic_mean", semantic_mean, "dense teacher_dense", "identity"),
    ("content_consistency", content, "dense teacher_coarser"),
    ("content_same", content, "dense teacher_dense", "identity"),
    (
        "labelled_cross_entropy",
        losses.labelled_cross_entropy,
        "dense dense_targets",
        "coupled pixels shift",
    ),
    ("gradient_penalty", losses.gradient_penalty, "dense"),
]
