"""A softmax and its normaliser, with derivatives that keep little.

Differentiating `log(sum(exp(x)))` step by step keeps `exp(x)` from the forward to the
backward pass. In `log_normalizer` the derivative is written as `exp(x - log_sum)`,
which the backward pass computes from `x` itself while it needs it; that of `softmax`
reads the result, in the dtype in which the network goes on.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer


def log_normalizer(
    x: Float[Array, "*rows k"],
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """The logarithm of `sum(exp(x))` over the last axis, in two parts.

    `log_softmax(x)` is `(x - maximum) - log_sum`, in this order exact for logits of any
    size.

    Args:
      x: logits, computed in their own dtype.

    Returns:
      `(maximum, log_sum)`: the largest entry, which is held constant, and the logarithm
      of `sum(exp(x - maximum))`.

    >>> maximum, log_sum = log_normalizer(jnp.array([1000.0, 1000.0]))
    >>> print(maximum, log_sum.round(4))
    1000.0 0.6931
    """
    maximum = jax.lax.stop_gradient(jnp.max(x, axis=-1))
    return maximum, _log_sum(x, maximum)


def pick(
    x: Float[Array, "*rows k"], index: Integer[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """The entry of every row at `index`; NaN where a row has no such entry.

    The gradient is a comparison with the index, while that of a gather is a scatter.

    >>> pick(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, 0])).tolist()
    [2.0, 3.0]
    """
    return _pick(x, index)


# One call instead of many, outside of jit.
@functools.partial(jax.jit, inline=True)
def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    entries = jnp.where(jax.nn.one_hot(index, x.shape[-1], dtype=bool), x, 0.0)
    inside = (index >= 0) & (index < x.shape[-1])
    return jnp.where(inside, jnp.sum(entries, axis=-1), jnp.nan)


@jax.custom_jvp
@functools.partial(jax.jit, inline=True)
def _log_sum(x: jax.Array, maximum: jax.Array) -> jax.Array:
    return jnp.log(jnp.sum(jnp.exp(x - maximum[..., None]), axis=-1))


@_log_sum.defjvp
def _log_sum_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    x, maximum = primals
    log_sum = _log_sum(x, maximum)
    # Or the compiler would see `x - maximum` twice and keep it.
    maximum = jax.lax.optimization_barrier(maximum)
    softmax = jnp.exp((x - maximum[..., None]) - log_sum[..., None])
    return log_sum, jnp.sum(softmax * tangents[0], axis=-1)


def softmax(
    x: Float[Array, "*rows k"], dtype: Any = jnp.float32
) -> Float[Array, "*rows k"]:
    """The softmax over the last axis, computed in float32 and returned in `dtype`.

    The derivative is computed in float32 from what is returned.

    >>> softmax(jnp.array([0.0, 0.0], jnp.bfloat16), jnp.bfloat16).tolist()
    [0.5, 0.5]
    """
    return _softmax(x, jnp.dtype(dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _softmax(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.nn.softmax(x.astype(jnp.float32), axis=-1).astype(dtype)


@_softmax.defjvp
def _softmax_jvp(
    dtype: jnp.dtype, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    result = _softmax(*primals, dtype)
    # Kept for the transposed rule is the result as it is, not in float32.
    rule = jax.checkpoint(_softmax_tangent, prevent_cse=False)
    return result, rule(result, tangents[0])


def _softmax_tangent(result: jax.Array, tangent: jax.Array) -> jax.Array:
    p, t = result.astype(jnp.float32), tangent.astype(jnp.float32)
    return (p * (t - jnp.sum(p * t, axis=-1, keepdims=True))).astype(result.dtype)
