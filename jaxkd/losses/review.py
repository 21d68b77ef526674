"""The hierarchical context loss of ReviewKD."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from jaxkd.losses.checks import check_maps, keep
from jaxkd.losses.features import hint
from jaxkd.numerics import adaptive_average_pool

_LEVELS = (4, 2, 1)


def hierarchical_context(
    student: Float[Array, "..."],
    teacher: Float[Array, "..."],
    *,
    where: Bool[Array, "batch"] | None = None,
) -> Float32[Array, "batch"]:
    """Squared difference of maps at several resolutions (Chen et al., 2021).

        sum_l w_l * mean (pool_l(student) - pool_l(teacher))^2 / sum_l w_l

    The maps are compared as they are, with weight 1, and average-pooled to 4x4, 2x2 and
    1x1 cells, with weights 1/2, 1/4 and 1/8. Grids that are not smaller than the map
    are left out and do not halve the weight: a 4x4 map has 1/2 and 1/4 for 2x2 and 1x1.

    Args:
      student: map `[batch, height, width, channels]`, after the connector.
      teacher: map of the same shape; no gradient reaches it.
      where: which examples count; the others get 0.

    Returns:
      One float32 value per example.

    Raises:
      ValueError: an input is no map, or the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> zeros = jnp.zeros((1, 2, 2, 1))
      >>> print(hierarchical_context(zeros + 1.0, zeros))
      [1.]

    Reference:
      Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021.
    """
    check_maps(student, teacher, what="features")
    student = student.astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    total, weight, weights = hint(student, teacher), 1.0, 1.0
    for cells in _LEVELS:
        if cells < min(student.shape[1:3]):
            weight /= 2
            weights += weight
            total = total + weight * hint(
                adaptive_average_pool(student, cells),
                adaptive_average_pool(teacher, cells),
            )
    return keep(total / weights, where)
