"""Attention, selectivity, flow, factors, activations, singular vectors."""

import jax.numpy as jnp
import numpy as np

from jaxkd import losses


def normal(*shape):
    return lambda rng, batch: rng.standard_normal((batch, *shape)).astype(np.float32)


INPUTS = {
    "tall_map": normal(5, 4, 3),
    "teacher_tall": normal(4, 4, 3),
    "wide_map": normal(2, 2, 6),
    "teacher_wide_map": normal(2, 2, 7),
    "many_channels": normal(2, 3, 7),
    "teacher_many": normal(2, 3, 7),
}


def at_paper(student, teacher):
    return losses.attention_transfer(student, teacher, norm="paper")


def ft_paper(student, teacher):
    return losses.ft(student, teacher, variant="paper", p2=2)


def ft_square(student, teacher):
    return losses.ft(student, teacher, p2=2)


def fsp(first, second, teacher_first, teacher_second):
    return losses.fsp((first, second), (teacher_first, teacher_second))


def fsp_with_itself(student, teacher):
    return losses.fsp((student, student), (teacher, teacher))


def ofd(student, teacher):
    return losses.ofd(student, teacher, jnp.array([-0.5, -0.1, -1.5]))


def kdsvd(first, second, teacher_first, teacher_second):
    return losses.kdsvd((first, second), (teacher_first, teacher_second))


def kdsvd_pixels(student, teacher):
    stages = (student, jnp.square(student)), (teacher, jnp.square(teacher))
    return losses.kdsvd(*stages, vectors=2, view="pixels")


# Where rounding is not squared (norms, absolute values, differences of means), jit may
# leave 1e-8 between equal networks; test_attention.py and test_factor.py have these.
LOSSES = [
    ("at", losses.attention_transfer, "map teacher_map", "identity"),
    ("at_pooled", losses.attention_transfer, "tall_map teacher_small"),
    ("at_paper", at_paper, "map teacher_map"),
    ("nst", losses.neuron_selectivity_transfer, "map teacher_map"),
    ("nst_pooled", losses.neuron_selectivity_transfer, "tall_map teacher_small"),
    (
        "nst_pixels",
        losses.neuron_selectivity_transfer,
        "many_channels teacher_many",
        "identity",
    ),
    ("fsp", fsp, "map small_map teacher_tall teacher_small"),
    ("fsp_with_itself", fsp_with_itself, "map teacher_map", "identity"),
    ("ft", losses.ft, "map teacher_map"),
    ("ft_square", ft_square, "map teacher_small"),
    ("ft_paper", ft_paper, "map teacher_map", "identity"),
    ("ab", losses.ab, "map teacher_map"),
    ("ofd", ofd, "map teacher_map", "identity"),
    ("ofd_pooled", ofd, "map teacher_tall"),
    ("kdsvd", kdsvd, "map tall_map teacher_map teacher_tall"),
    ("kdsvd_pixels", kdsvd_pixels, "map teacher_map", "identity"),
]
