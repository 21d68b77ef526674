"""Losses of features after their connectors. See test_contract.py for the columns."""

import functools

import jax.numpy as jnp
import numpy as np

from jaxkd import losses


def normal(*shape):
    return lambda rng, batch: rng.standard_normal((batch, *shape)).astype(np.float32)


INPUTS = {
    "connected": normal(3, 4, 3),
    "teacher_connected": normal(3, 4, 3),
    "large_connected": normal(5, 6, 2),
    "teacher_large_connected": normal(5, 6, 2),
    "vector": normal(4),
    "teacher_vector": normal(4),
    "teacher_scores": normal(5),
}


def head():
    rng = np.random.default_rng(1)
    kernel, bias = rng.standard_normal((4, 5)), rng.standard_normal(5)
    return {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}


def vid(mean, teacher, **options):
    log_scale = jnp.linspace(-1.0, 3.0, mean.shape[-1])
    return losses.vid(mean, teacher, log_scale, **options)


def some_positions(student, teacher, **options):
    positions = jnp.arange(12.0).reshape(1, 3, 4, 1) % 2
    return losses.reconstruction(student, teacher, positions=positions, **options)


MAPS = "connected teacher_connected"

LOSSES = [
    ("hint", losses.hint, MAPS, "identity where"),
    ("hint_vectors", losses.hint, "vector teacher_vector", "identity where"),
    ("reconstruction", losses.reconstruction, MAPS, "identity where"),
    ("reconstruction_positions", some_positions, MAPS, "identity where"),
    ("vid", vid, MAPS, "where"),
    (
        "softmax_regression",
        functools.partial(losses.softmax_regression, **head()),
        "vector teacher_scores",
        "where",
    ),
    (
        "hierarchical_context",
        losses.hierarchical_context,
        "large_connected teacher_large_connected",
        "identity where",
    ),
]
