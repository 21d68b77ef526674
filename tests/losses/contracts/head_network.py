"""Squared errors of feature maps. See test_contract.py for the columns."""

import numpy as np

from jaxkd import losses


def normal(*shape):
    return lambda rng, batch: rng.standard_normal((batch, *shape)).astype(np.float32)


INPUTS = {"restored_map": normal(3, 2, 4), "teacher_restored": normal(3, 2, 4)}

LOSSES = [
    (
        "squared_error_sum",
        losses.squared_error_sum,
        "restored_map teacher_restored",
        "identity where",
    ),
]
