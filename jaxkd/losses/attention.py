"""Where feature maps respond: attention transfer and neuron selectivity transfer.

Attention transfer compares one spatial map per example, averaged over channels. Neuron
selectivity transfer compares the set of all channels' spatial maps, whatever their
number and order. `jaxkd.losses.hlfd.importance_map_distillation` is the other variant
of attention transfer: exponent 4, a sum over pixels, bilinear resizing.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxkd.losses.checks import (
    check_maps,
    mean_per_example,
    sum_per_example,
)
from jaxkd.losses.maps import pool_to_smallest
from jaxkd.numerics import l2_normalize


def attention_map(
    x: Float[Array, "b h w c"], *, exponent: int = 2
) -> Float32[Array, "b hw"]:
    """The spatial attention of a feature map, a unit vector over its pixels.

        A(x) = a / max(||a||, 1e-12),    a = mean over channels of x^p

    A map of zeros gives zeros and gets a zero gradient. The paper raises `|x|` to the
    power, the published code `x`: the same for even `p`.

    Args:
      x: feature map.
      exponent: the power p.

    Returns:
      float32 `[batch, height * width]`.

    Raises:
      ValueError: `x` is not a map, or `exponent` is below 1.
    """
    check_maps(x, what="attention maps")
    if exponent < 1:
        raise ValueError(f"exponent must be an integer above 0, got {exponent}")
    mean = jnp.mean(x.astype(jnp.float32) ** exponent, axis=-1)
    return l2_normalize(mean.reshape(mean.shape[0], -1), axis=-1)


def attention_transfer(
    student: Float[Array, "b h w c"],
    teacher: Float[Array, "..."],
    *,
    exponent: int = 2,
    norm: Literal["code", "paper"] = "code",
) -> Float32[Array, "b"]:
    """Distance of two attention maps (Zagoruyko and Komodakis, 2017, Eq. 2).

        norm="code":   mean over pixels of (A(student) - A(teacher))^2
        norm="paper":  ||A(student) - A(teacher)||_2

    with `A` of `attention_map`. The larger of the two feature maps is averaged down to
    the size of the smaller one first.

    Args:
      student: feature map; channels are free.
      teacher: feature map of the same batch; no gradient reaches it.
      exponent: the power in `attention_map`.
      norm: `"code"` as published code reduces, or `"paper"`.

    Returns:
      float32 `[batch]`.

    Raises:
      ValueError: an array is not a map, batches differ, or an option is impossible.

    Example:
      >>> student = jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1)
      >>> teacher = jnp.array([0.0, 3.0]).reshape(1, 1, 2, 1)
      >>> print(attention_transfer(student, teacher))
      [1.]

    Reference:
      Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the
      Performance of Convolutional Neural Networks via Attention Transfer", ICLR 2017.
    """
    if norm not in ("code", "paper"):
        raise ValueError(f"norm must be 'code' or 'paper', got {norm!r}")
    student, teacher = pool_to_smallest(
        student, jax.lax.stop_gradient(teacher), what="attention maps"
    )
    a_student = attention_map(student, exponent=exponent)
    a_teacher = attention_map(teacher, exponent=exponent)
    squares = jnp.square(a_student - a_teacher)
    if norm == "paper":
        return _root(sum_per_example(squares))
    return mean_per_example(squares)


def neuron_selectivity_transfer(
    student: Float[Array, "b h w c"], teacher: Float[Array, "..."]
) -> Float32[Array, "b"]:
    """Discrepancy of two sets of channels (Huang and Wang, 2017).

        mean_ij k(t_i, t_j) + mean_ij k(s_i, s_j) - 2 mean_ij k(s_i, t_j)
        k(a, b) = (a . b)^2

    where `s_i` is channel `i` of the student over all pixels, scaled to unit length,
    and `t_j` likewise of the teacher: the squared maximum mean discrepancy of the two
    sets of vectors under a polynomial kernel. The larger map is averaged down to the
    size of the smaller one first.

    Since `k(a, b)` is the inner product of `a a^T` and `b b^T`, the value is also the
    squared distance of two matrices of pixels, `mean_i s_i s_i^T` and `mean_j t_j
    t_j^T`. Whichever form has the smaller matrices is computed.

    Args:
      student: feature map.
      teacher: feature map of the same batch; channels are free. No gradient reaches it.

    Returns:
      float32 `[batch]`, at least zero up to rounding.

    Raises:
      ValueError: an array is not a map, or batches differ.

    Reference:
      Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity
      Transfer", 2017.
    """
    s, t = (
        _unit_channels(x)
        for x in pool_to_smallest(
            student, jax.lax.stop_gradient(teacher), what="selectivity maps"
        )
    )
    if s.shape[1] <= max(s.shape[2], t.shape[2]):
        return sum_per_example(jnp.square(_second_moment(s) - _second_moment(t)))
    return _mean_kernel(t, t) + _mean_kernel(s, s) - 2 * _mean_kernel(s, t)


def _root(squares: Float32[Array, "b"]) -> Float32[Array, "b"]:
    """Square root with gradient zero at zero."""
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def _unit_channels(x: Float32[Array, "b h w c"]) -> Float32[Array, "b hw c"]:
    return l2_normalize(x.reshape(x.shape[0], -1, x.shape[-1]), axis=1)


def _second_moment(x: Float32[Array, "b n c"]) -> Float32[Array, "b n n"]:
    return jnp.einsum("bnc,bmc->bnm", x, x, precision="highest") / x.shape[-1]


def _mean_kernel(
    x: Float32[Array, "b n c"], y: Float32[Array, "b n d"]
) -> Float32[Array, "b"]:
    products = jnp.einsum("bnc,bnd->bcd", x, y, precision="highest")
    return mean_per_example(jnp.square(products))
