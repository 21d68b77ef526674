"""Losses on values before a ReLU: activation boundaries and partial distances.

A ReLU makes two halves of every neuron's range. Activation boundaries (AB) only ask on
which side a neuron is; the overhaul of feature distillation (OFD) copies positive
values and leaves negative ones alone where they are negative enough.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxkd.losses.checks import Scalar, check_maps, check_positive, sum_per_example
from jaxkd.numerics import adaptive_average_pool


def ab(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "..."],
    *,
    margin: Scalar = 1.0,
) -> Float32[Array, "b"]:
    """Squared hinge on the side of the teacher's ReLU (Heo et al., AAAI 2019).

        sum over pixels and channels of
            max(s + m, 0)^2   where t <= 0
            max(m - s, 0)^2   where t > 0

    Args:
      student: values before a ReLU, behind the connector.
      teacher: values before a ReLU, of the same shape; no gradient reaches it, and only
        its signs matter.
      margin: how far beyond zero a neuron must be.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: an array is not a map, shapes differ, or `margin` is not positive.

    Example:
      >>> student = jnp.array([0.5, 0.5, 2.0]).reshape(1, 1, 1, 3)
      >>> teacher = jnp.array([3.0, -1.0, 1.0]).reshape(1, 1, 1, 3)
      >>> print(ab(student, teacher))
      [2.5]

    Reference:
      Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed
      by Hidden Neurons", AAAI 2019.
    """
    check_positive("margin", margin)
    check_maps(student, teacher, what="activation maps")
    if student.shape != teacher.shape:
        raise ValueError(
            f"activation maps must have one shape, got student {student.shape} and "
            f"teacher {teacher.shape}; put a connector on the student's"
        )
    s = student.astype(jnp.float32)
    active = jax.lax.stop_gradient(teacher) > 0
    distance = jnp.where(active, margin - s, margin + s)
    return sum_per_example(jnp.square(jax.nn.relu(distance)))


def ofd(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "..."],
    margin: Float[Array, "..."],
) -> Float32[Array, "b"]:
    """Partial squared distance before a ReLU (Heo et al., ICCV 2019).

        sum over pixels and channels of (s - max(t, m))^2, but 0 where t <= 0 and
        s <= max(t, m)

    Where the teacher is positive the student copies it; where it is negative, the
    student only has to be as negative as the teacher or as the margin.

    Args:
      student: values before a ReLU, behind the connector.
      teacher: values before a ReLU; channels as the student's. It is averaged to the
        student's size, by adaptive pooling. No gradient reaches it.
      margin: `[c]`, at most zero, from `ofd_margin`; no gradient reaches it.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: an array is not a map, or batches or channels differ.

    Example:
      >>> student = jnp.array([2.0, -0.25, -9.0]).reshape(1, 1, 1, 3)
      >>> teacher = jnp.array([1.0, -3.0, -3.0]).reshape(1, 1, 1, 3)
      >>> print(ofd(student, teacher, jnp.full(3, -0.5)))
      [1.0625]

    Reference:
      Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019.
    """
    check_maps(student, teacher, what="activation maps")
    channels = student.shape[-1]
    if teacher.shape[-1] != channels or margin.shape != (channels,):
        raise ValueError(
            f"activation maps need equal channels and one margin for each; student "
            f"{student.shape}, teacher {teacher.shape}, margin {margin.shape}"
        )
    s = student.astype(jnp.float32)
    t = adaptive_average_pool(
        jax.lax.stop_gradient(teacher).astype(jnp.float32), s.shape[1:3]
    )
    least = jax.lax.stop_gradient(margin).astype(jnp.float32).reshape(1, 1, 1, -1)
    excess = s - jnp.maximum(t, least)
    return sum_per_example(jnp.square(jnp.where(t > 0, excess, jax.nn.relu(excess))))


def ofd_margin(
    scale: Float[Array, "..."], bias: Float[Array, "..."]
) -> Float32[Array, "c"]:
    """Expected value of a batch norm's negative outputs (Heo et al., ICCV 2019).

        m = E[x | x < 0] = bias - |scale| pdf(bias / |scale|) / cdf(-bias / |scale|)

    for normal `x` with mean `bias` and deviation `|scale|`, where `pdf` and `cdf` are
    those of the standard normal distribution. Channels that are negative with a
    probability of at most 0.001 get `-3 |scale|`, as in the published code.

    Args:
      scale: `[c]`, of the batch norm before the ReLU; its sign does not matter.
      bias: `[c]`, of the same batch norm.

    Returns:
      float32 `[channels]`, never positive.

    Raises:
      ValueError: the two are not vectors of one length.

    Example:
      >>> (margin,) = ofd_margin(jnp.array([1.0]), jnp.array([0.0]))
      >>> print(f"{margin:.4f}")
      -0.7979
    """
    if scale.ndim != 1 or scale.shape != bias.shape:
        raise ValueError(
            f"scale and bias must be vectors of one length, got {scale.shape} and "
            f"{bias.shape}"
        )
    mean = bias.astype(jnp.float32)
    # The bound only matters for a scale of zero, whose channel is constant.
    deviation = jnp.maximum(jnp.abs(scale.astype(jnp.float32)), 1e-12)
    ratio = mean / deviation
    negative = jax.scipy.stats.norm.cdf(-ratio)
    density = jax.scipy.stats.norm.pdf(ratio)
    likely = negative > 0.001
    expected = mean - deviation * density / jnp.where(likely, negative, 1.0)
    return jnp.where(likely, expected, -3.0 * deviation)
