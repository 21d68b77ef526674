"""Feature maps of different networks brought to one size before they are compared."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxkd.losses.checks import check_maps
from jaxkd.numerics import adaptive_average_pool


def pool_to_smallest(
    *maps: Float[Array, "..."], what: str
) -> list[Float32[Array, "b h w _"]]:
    """Averages every map down to the smallest height and width among them.

    Args:
      *maps: feature maps of one batch; sizes and channels are free.
      what: the maps' name in messages.

    Returns:
      float32 maps of one size, in the order given.

    Raises:
      ValueError: an array is not a map, or batches differ.
    """
    check_maps(*maps, what=what)
    size = min(x.shape[1] for x in maps), min(x.shape[2] for x in maps)
    return [adaptive_average_pool(x.astype(jnp.float32), size) for x in maps]
