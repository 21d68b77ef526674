"""The product of a network with a matrix of weights."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from flax.linen import dtypes

from jaxkd.layers import rules


class Dense(nn.Dense):
    """`flax.linen.Dense`, obeying `jaxkd.layers.rules`."""

    # As there, of a type that can be checked at run time.
    promote_dtype: Any = dtypes.promote_dtype

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `[..., channels]` to `[..., features]`."""
        return rules.obey(self, super().__call__, inputs)
