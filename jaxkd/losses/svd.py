"""Singular vectors of feature maps and how they change between stages (KDSVD)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxkd.losses.checks import check_maps, check_positive, sum_per_example
from jaxkd.numerics import l2_normalize

View = Literal["rows", "pixels"]
Maps = Float[Array, "b _ _ _"]

# The student offers so many more singular vectors than the teacher has, to choose from.
_MORE = 3
# Squared singular values that differ by less than this share of the largest one have
# vectors that are rounding noise.
_RESOLUTION = 1e-6


def kdsvd(
    students: Sequence[Maps],
    teachers: Sequence[Maps],
    *,
    vectors: int = 1,
    view: View = "rows",
) -> Float32[Array, "b"]:
    """Change of singular vectors from stage to stage (Lee et al., 2018).

        sum over consecutive stages i and all entries of (R(s, i) - R(t, i))^2
        R(v, i)_abk = exp(-(v_i[a, k] - v_(i-1)[b, k])^2 / 8)

    `t_i` are the first right singular vectors of the teacher's map at stage `i`; `s_i`
    is, for each of them, the one of the student's first `vectors + 3` that is closest
    to it in absolute cosine, with the sign of the cosine. Both are multiplied with the
    teacher's singular values, scaled to unit length. A map is read as a matrix:

        view="rows":    [channels * height, width], the reading of mdistiller
        view="pixels":  [height * width, channels], that of RepDistiller

    The signs of singular vectors are arbitrary, and the value depends on those of the
    teacher. Here the largest entry of each vector is positive, on every device; the
    published code takes the signs that its library returns.

    The gradient is that of the exact singular vectors. Those that belong to equal
    singular values are no functions of the map: between two squared singular values
    closer than 1e-6 of the largest, no gradient flows. Just above that distance the
    true gradient is large; clip gradients, or expect noise from maps whose leading
    singular values are close. Which student vector is chosen is constant.

    Args:
      students: maps of the student, stage by stage.
      teachers: maps of the teacher; at each stage of the student's width (`"rows"`) or
        channels (`"pixels"`). No gradient reaches them.
      vectors: singular vectors of the teacher to compare.
      view: which matrix a map is read as.

    Returns:
      float32 `[batch]`; zero for a single stage.

    Raises:
      ValueError: an array is not a map, the numbers of stages or the lengths of the
        singular vectors differ, a map has fewer singular vectors than asked for, or an
        option is impossible.

    Reference:
      Lee, Kim, Song, "Self-supervised Knowledge Distillation Using Singular Value
      Decomposition", ECCV 2018.
    """
    check_positive("vectors", vectors)
    if view not in ("rows", "pixels"):
        raise ValueError(f"view must be 'rows' or 'pixels', got {view!r}")
    if len(students) != len(teachers):
        raise ValueError(
            f"{len(students)} student maps and {len(teachers)} teacher maps; their "
            f"stages must match"
        )
    check_maps(*students, *teachers, what="maps")
    stages = [
        _aligned(_matrix(s, view), _matrix(jax.lax.stop_gradient(t), view), vectors)
        for s, t in zip(students, teachers, strict=True)
    ]
    total = jnp.zeros(students[0].shape[0], jnp.float32)
    for (s_before, t_before), (s, t) in zip(stages, stages[1:], strict=False):
        squares = jnp.square(_change(s, s_before) - _change(t, t_before))
        total += sum_per_example(squares)
    return total


def singular_vectors(
    x: Float32[Array, "b m n"], count: int
) -> tuple[Float32[Array, "b k"], Float32[Array, "b n k"]]:
    """The largest singular values of matrices and their right singular vectors.

    Only the vectors carry a gradient; see `kdsvd` for where it is defined.

    Args:
      x: matrices.
      count: how many; fewer are returned if a matrix has fewer.

    Returns:
      Singular values in descending order, and vectors as columns.
    """
    values, columns = _decompose(x)
    count = min(count, values.shape[-1])
    return values[:, :count], _first_columns(x, values, columns, count)


def _matrix(x: Maps, view: View) -> Float32[Array, "b m n"]:
    x = x.astype(jnp.float32)
    if view == "rows":
        # The order of a matrix's rows does not change its right singular vectors.
        x = x.transpose(0, 1, 3, 2)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _aligned(
    student: Float32[Array, "b _ _"], teacher: Float32[Array, "b _ _"], count: int
) -> tuple[Float32[Array, "b n k"], Float32[Array, "b n k"]]:
    """The teacher's weighted vectors and the student's that come closest to them."""
    length = teacher.shape[-1]
    if student.shape[-1] != length:
        raise ValueError(
            f"singular vectors of the student have {student.shape[-1]} entries and "
            f"those of the teacher {length}; compare maps of one width "
            f"(view='rows') or one number of channels (view='pixels')"
        )
    available = min(student.shape[1:] + teacher.shape[1:])
    if count > available:
        raise ValueError(
            f"vectors must be at most {available}, the smallest side of the matrices "
            f"{student.shape[1:]} and {teacher.shape[1:]}, got {count}"
        )
    values, t = singular_vectors(teacher, count)
    _, s = singular_vectors(student, count + _MORE)
    largest = jnp.argmax(jnp.abs(t), axis=1, keepdims=True)
    t = t * jnp.sign(jnp.take_along_axis(t, largest, axis=1))
    cosine = jnp.einsum("bnj,bnk->bjk", s, t, precision="highest")
    closest = jnp.abs(cosine) == jnp.max(jnp.abs(cosine), axis=1, keepdims=True)
    choice = jax.lax.stop_gradient(jnp.where(closest, jnp.sign(cosine), 0.0))
    s = jnp.einsum("bnj,bjk->bnk", s, choice, precision="highest")
    weight = l2_normalize(values, axis=-1)[:, None, :]
    return s * weight, t * weight


def _change(
    now: Float32[Array, "b n k"], before: Float32[Array, "b m k"]
) -> Float32[Array, "b n m k"]:
    return jnp.exp(-jnp.square(now[:, :, None, :] - before[:, None, :, :]) / 8)


def _decompose(
    x: Float32[Array, "b m n"],
) -> tuple[Float32[Array, "b r"], Float32[Array, "b n r"]]:
    """Singular values and right singular vectors, without a gradient."""
    _, values, rows = jnp.linalg.svd(jax.lax.stop_gradient(x), full_matrices=False)
    finite = [jnp.where(jnp.isfinite(y), y, 0.0) for y in (values, rows)]
    return finite[0], finite[1].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _first_columns(
    x: Float32[Array, "b m n"],
    values: Float32[Array, "b r"],
    columns: Float32[Array, "b n r"],
    count: int,
) -> Float32[Array, "b n k"]:
    """The first columns, differentiable by the matrix `x` that they belong to."""
    del x, values
    return columns[:, :, :count]


def _first_columns_forward(x, values, columns, count):
    return columns[:, :, :count], (x, values, columns)


def _first_columns_backward(count, residual, cotangent):
    # With squared singular values l and right singular vectors v of x,
    #   dv_k = sum_(j != k) v_j v_j^T d(x^T x) v_k / (l_k - l_j),
    # where vectors outside the rows of x have l_j = 0. Scaling by the largest singular
    # value keeps l in range.
    x, values, v = residual
    largest = values[:, :1]
    scale = jnp.where(largest > 0, largest, 1.0)
    y = x / scale[:, :, None]
    squares = jnp.square(values / scale)
    einsum = functools.partial(jnp.einsum, precision="highest")
    gaps = squares[:, None, :count] - squares[:, :, None]
    inside = einsum("bnj,bnk->bjk", v, cotangent)
    q = einsum("bnj,bjk->bnk", v, _divide(inside, gaps))
    if v.shape[2] < v.shape[1]:
        outside = cotangent - einsum("bnj,bjk->bnk", v, inside)
        q = q + _divide(outside, squares[:, None, :count])
    first = v[:, :, :count]
    d_y = einsum("bmn,bnk,blk->bml", y, first, q) + einsum(
        "bmn,bnk,blk->bml", y, q, first
    )
    return d_y / scale[:, :, None], jnp.zeros_like(values), jnp.zeros_like(v)


def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient, or zero where the denominator is rounding noise."""
    noise = jnp.abs(denominator) < _RESOLUTION
    return jnp.where(noise, 0.0, numerator / jnp.where(noise, 1.0, denominator))


_first_columns.defvjp(_first_columns_forward, _first_columns_backward)
