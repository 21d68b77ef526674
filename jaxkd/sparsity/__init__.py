"""Sparse training and pruning: masks, schedules, iso-FLOP layers, smaller networks.

Compressions register themselves; `jaxkd.compression.create` makes them by name. Here
are the functions that they are made of.
"""

from jaxkd.sparsity.distributions import densities, er, erk
from jaxkd.sparsity.iso_flop import (
    branches,
    doped_rank,
    factorized_rank,
    wide_features,
    widening,
)
from jaxkd.sparsity.masks import Scope, bernoulli_mask, exchange, magnitude_mask
from jaxkd.sparsity.schedules import cubic_sparsity, drop_fraction

__all__ = [
    "Scope",
    "bernoulli_mask",
    "branches",
    "cubic_sparsity",
    "densities",
    "doped_rank",
    "drop_fraction",
    "er",
    "erk",
    "exchange",
    "factorized_rank",
    "magnitude_mask",
    "wide_features",
    "widening",
]
