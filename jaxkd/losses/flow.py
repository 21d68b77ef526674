"""How features change from layer to layer: the flow of solution procedure (FSP)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxkd.losses.checks import mean_per_example
from jaxkd.losses.maps import pool_to_smallest

Maps = Float[Array, "b _ _ _"]


def flow_matrix(first: Maps, second: Maps) -> Float32[Array, "b c d"]:
    """Inner products of the channels of two layers of one network (FSP, Eq. 1).

        G_cd = mean over pixels of first_c second_d

    The larger map is averaged down to the size of the smaller one first.

    Args:
      first: feature map with `c` channels.
      second: feature map of the same batch with `d` channels.

    Returns:
      float32 `[batch, c, d]`.

    Raises:
      ValueError: an array is not a map, or batches differ.
    """
    first, second = pool_to_smallest(first, second, what="flow maps")
    pixels = first.shape[1] * first.shape[2]
    return jnp.einsum("bhwc,bhwd->bcd", first, second, precision="highest") / pixels


def fsp(student: tuple[Maps, Maps], teacher: tuple[Maps, Maps]) -> Float32[Array, "b"]:
    """Distance of two networks' flow matrices (Yim et al., 2017, Eq. 2).

        mean over channel pairs of (G(student) - G(teacher))^2

    with `G` of `flow_matrix`. The flow matrix has no pixels, so the sizes of the maps
    are free; the channels of student and teacher must match, layer by layer.

    Args:
      student: two feature maps of the student, first and second layer.
      teacher: those of the teacher; no gradient reaches them.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: an array is not a map, batches differ, or channels differ.

    Example:
      >>> one = jnp.ones((1, 2, 2, 1))
      >>> print(fsp((one, 3 * one), (one, one)))
      [4.]

    Reference:
      Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network
      Minimization and Transfer Learning", CVPR 2017.
    """
    g_student = flow_matrix(*student)
    g_teacher = flow_matrix(*jax.lax.stop_gradient(teacher))
    if g_student.shape != g_teacher.shape:
        raise ValueError(
            f"flow matrices need layers of equal widths and one batch size; student "
            f"{g_student.shape}, teacher {g_teacher.shape} (batch, first, second)"
        )
    return mean_per_example(jnp.square(g_student - g_teacher))
