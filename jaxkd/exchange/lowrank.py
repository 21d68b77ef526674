"""PowerSGD: gradients sent as products of thin matrices, with error feedback.

Vogels, Karimireddy and Jaggi, PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization, NeurIPS 2019; the order of a step is that of the widely used
communication hook.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxkd.exchange.base import (
    Arrays,
    Exchange,
    by_path,
    in_tree,
    register,
    when_finite,
)

# Up to this rank, and in 16 bits, columns are made orthonormal one by one.
_GRAM_SCHMIDT_RANK = 2


@flax.struct.dataclass
class PowerSgdState:
    """What one device remembers of the tensors that are compressed, by path.

    Attributes:
      error: what has not been sent, as matrices `[outputs, rest]`.
      right: the right factors of the step before, `[rest, rank]`, equal everywhere.
    """

    error: Any
    right: Any


@register("powersgd")
def powersgd(
    *,
    rank: int = 4,
    ranks: Mapping[str, int] | None = None,
    start_step: int = 0,
    seed: int = 0,
    axis: str = "data",
) -> Exchange:
    """PowerSGD with error feedback and warm start.

    A tensor with two axes or more is a matrix `M` of `[outputs, rest]`; with the error
    `E` of the step before, `A = M + E`; `P = mean(A Q)`, made orthonormal;
    `Q = mean(A^T P)`; the result is `P Q^T` and `E = A - P Q^T`. Tensors of fewer axes,
    and matrices `[n, m]` with `2 rank (n + m) >= n m`, are averaged whole. The
    optimiser applies its own momentum afterwards.

    Args:
      rank: of every product.
      ranks: of the tensors named by their paths, such as `lgreco_ranks` finds; those
        are compressed whatever their size, and all others are averaged whole.
      start_step: steps before the first compressed one, which average whole gradients.
      seed: of the first right factors.
      axis: the devices.

    Raises:
      ValueError: an impossible option.
    """
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    if ranks is not None and min(ranks.values(), default=0) < 1:
        raise ValueError(f"ranks must name tensors with ranks >= 1, got {dict(ranks)}")
    if start_step < 0:
        raise ValueError(f"start_step must be >= 0, got {start_step}")

    def chosen(arrays: Arrays) -> dict[str, int]:
        if ranks is None:
            return compressible(arrays, rank)
        for path in ranks:
            if path not in arrays or arrays[path].ndim < 2:
                raise ValueError(f"ranks names {path!r}, which is no tensor of 2 axes")
        return {p: min(r, *matrix_shape(arrays[p].shape)) for p, r in ranks.items()}

    def init(params: Any) -> PowerSgdState:
        arrays = by_path(params)
        own = chosen(arrays)
        if not own:
            raise ValueError(f"no parameter is large enough for rank {rank}")
        key = jax.random.key(seed)
        error, right = {}, {}
        for i, (path, own_rank) in enumerate(own.items()):
            x = arrays[path]
            rows, columns = matrix_shape(x.shape)
            error[path] = jnp.zeros((rows, columns), x.dtype)
            right[path] = jax.random.normal(
                jax.random.fold_in(key, i), (columns, own_rank), x.dtype
            )
        return PowerSgdState(error=error, right=right)

    def mean(x: jax.Array) -> jax.Array:
        return jax.lax.pmean(x, axis)

    def compressed(
        gradients: Arrays, state: PowerSgdState
    ) -> tuple[Arrays, PowerSgdState]:
        results, error, right = {}, {}, {}
        for path, g in gradients.items():
            if path not in state.right:
                results[path] = mean(g)
                continue
            total = to_matrix(g) + state.error[path]
            product, right[path] = low_rank_round(total, state.right[path], mean=mean)
            error[path] = total - product
            results[path] = from_matrix(product, g.shape)
        return results, PowerSgdState(error=error, right=right)

    def whole(gradients: Arrays, state: PowerSgdState) -> tuple[Arrays, PowerSgdState]:
        return {path: mean(g) for path, g in gradients.items()}, state

    def update(
        gradients: Any, state: PowerSgdState, *, step: Any, key: Any
    ) -> tuple[Any, PowerSgdState]:
        del key
        arrays = by_path(gradients)
        if start_step:
            results, state = jax.lax.cond(
                step < start_step, whole, compressed, arrays, state
            )
        else:
            results, state = compressed(arrays, state)
        return in_tree(results, gradients), state

    return Exchange(init=init, update=when_finite(update, axis))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """`(outputs, rest)` of a kernel `[..., outputs]`."""
    return shape[-1], math.prod(shape[:-1])


def to_matrix(kernel: jax.Array) -> jax.Array:
    """The kernel `[..., outputs]` as a matrix `[outputs, rest]`."""
    return kernel.reshape(-1, kernel.shape[-1]).T


def from_matrix(matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The kernel of a shape from its matrix."""
    return matrix.T.reshape(shape)


def compressible(arrays: Mapping[str, Any], rank: int) -> dict[str, int]:
    """The rank of every tensor that gets smaller: `2 rank (n + m) < n m`.

    Args:
      arrays: concrete or abstract, by path.
      rank: of all.
    """
    found = {}
    for path, x in arrays.items():
        if len(x.shape) > 1:
            n, m = matrix_shape(x.shape)
            if 2 * rank * (n + m) < n * m:
                found[path] = min(rank, n, m)
    return found


def low_rank_round(
    matrix: jax.Array,
    right: jax.Array,
    *,
    mean: Callable[[jax.Array], jax.Array] = lambda x: x,
    orthonormal: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One round of the power method on the mean of all devices' matrices.

    Args:
      matrix: of this device, `[n, m]`.
      right: the right factor of the round before, `[m, rank]`.
      mean: over the devices.
      orthonormal: makes columns orthonormal; by default as the hook chooses.

    Returns:
      The product `P Q^T`, `[n, m]`, and the new right factor `Q`, `[m, rank]`.
    """
    orthonormal = orthonormal or orthonormalised
    left = orthonormal(mean(matrix @ orthonormal(right)))
    right = mean(matrix.T @ left)
    return left @ right.T, right


def orthonormalised(matrix: jax.Array) -> jax.Array:
    """Columns made orthonormal: one by one if they are few or in 16 bits, else by QR.

    The two differ in the signs of columns, and so not in the product of a round.
    """
    if matrix.shape[1] <= _GRAM_SCHMIDT_RANK or matrix.dtype.itemsize == 2:
        return gram_schmidt(matrix)
    return jnp.linalg.qr(matrix)[0]


def gram_schmidt(matrix: jax.Array) -> jax.Array:
    """Columns made orthonormal one after the other; a column of zeros stays.

    Args:
      matrix: `[n, rank]`.
    """
    columns = [matrix[:, i] for i in range(matrix.shape[1])]
    for i, column in enumerate(columns):
        norm = jnp.sqrt(jnp.sum(jnp.square(column)))
        # A gradient of zeros is no direction; 0 / 0 would stay in Q for ever.
        column = column / jnp.where(norm == 0, 1, norm).astype(column.dtype)
        columns[i] = column
        for j in range(i + 1, len(columns)):
            columns[j] = columns[j] - jnp.sum(column * columns[j]) * column
    return jnp.stack(columns, axis=1)


def with_ranks(
    state: PowerSgdState, ranks: Mapping[str, int], *, seed: int
) -> PowerSgdState:
    """The state with other ranks: right factors drawn anew, errors kept.

    Args:
      state: of the exchange before; of one device, or with an axis of devices before
        all others.
      ranks: of the same tensors, by path.
      seed: of the new factors.

    Raises:
      ValueError: the ranks are of other tensors.
    """
    if set(ranks) != set(state.right):
        raise ValueError(f"ranks must name {sorted(state.right)}, got {sorted(ranks)}")
    key, right = jax.random.key(seed), {}
    for i, (path, before) in enumerate(state.right.items()):
        shape = (before.shape[-2], ranks[path])
        new = jax.random.normal(jax.random.fold_in(key, i), shape, before.dtype)
        right[path] = jnp.broadcast_to(new, (*before.shape[:-2], *shape))
    return state.replace(right=right)  # type: ignore[attr-defined]
