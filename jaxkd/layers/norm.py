"""Batch normalisation and layer normalisation, with gradients written out.

`BatchNorm` differs from `flax.linen.BatchNorm` in one number: the running variance is
the unbiased one, as in the framework in which the reference networks were trained.
Under `jax.jit` its statistics are those of the global batch, however it is sharded.

What the backward pass keeps is the input, in the dtype in which it came, and the
statistics. That saves about a third of the time of a batch norm on a CPU, and keeps
float32 copies of bfloat16 activations from being stored.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.layers import rules


class BatchNorm(nn.Module):
    """Normalises every channel to zero mean and unit variance, then scales it.

    Computes in float32. Training uses the batch's mean and biased variance and moves
    the running statistics by `1 - momentum` towards the batch's mean and unbiased
    variance; evaluation uses the running ones.

    Attributes:
      momentum: share of the running statistics that is kept at every step.
      epsilon: added to the variance.
      dtype: dtype of the result.

    Reference: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network
    Training by Reducing Internal Covariate Shift", ICML 2015.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*lead c"], train: bool
    ) -> Float[Array, "*lead new_c"]:
        """Normalises `[..., channels]`; `train` selects the batch's statistics.

        A rule may return fewer channels.
        """
        return rules.obey(self, self._normalised, x, train)

    def _normalised(self, x: jax.Array, train: bool) -> jax.Array:
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        if not train:
            inverse = jax.lax.rsqrt(var.value + self.epsilon) * scale
            y = _per_channel(x.astype(jnp.float32), mean.value, inverse, bias)
            return y.astype(self.dtype)
        y, batch_mean, batch_var = _normalize(x, scale, bias, mean.value, self.epsilon)
        if not self.is_initializing():
            count = x.size // x.shape[-1]
            unbiased = batch_var * (count / max(count - 1, 1))
            mean.value = _move(mean.value, batch_mean, self.momentum)
            var.value = _move(var.value, unbiased, self.momentum)
        return y.astype(self.dtype)


class LayerNorm(nn.Module):
    """Normalises the channels of every token, then scales them.

    Computes in float32, the variance in a second pass. Parameters are those of
    `flax.linen.LayerNorm`.

    Attributes:
      epsilon: added to the variance.
      dtype: dtype of the result.

    Reference: Ba, Kiros, Hinton, "Layer Normalization", 2016.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*lead c"]) -> Float[Array, "*lead c"]:
        """Normalises `[..., channels]`."""
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        return _normalize_tokens(x, scale, bias, self.epsilon).astype(self.dtype)


# Below so many values per channel a second pass costs nothing, and the variance of two
# or three values needs it.
_FEW = 4096


def _move(old: jax.Array, new: jax.Array, momentum: float) -> jax.Array:
    return momentum * old + (1 - momentum) * jax.lax.stop_gradient(new)


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Shapes `[c]` so that it broadcasts against `[..., c]` without rank promotion."""
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


def _per_channel(
    x: jax.Array, shift: jax.Array, factor: jax.Array, offset: jax.Array
) -> jax.Array:
    return (x - _row(shift, x)) * _row(factor, x) + _row(offset, x)


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, tuple(range(x.ndim - 1)))


def _normalize_with_moments(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    near: jax.Array,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The normalised `x` in float32, and the mean and biased variance of the batch.

    `near` is a vector near the mean. Of many values both moments are taken about it in
    one pass over `x`; taken about zero, a variance far below the squared mean would
    cancel.
    """
    return _normalize_forward(x, scale, bias, near, epsilon)[0]


def _normalize_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array, epsilon: float
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
    count = x.size // x.shape[-1]
    wide = x.astype(jnp.float32)
    distance = wide - _row(near, wide)
    first = _sum(distance) / count
    mean = near + first
    if count < _FEW:
        var = _sum(jnp.square(wide - _row(mean, wide))) / count
    else:
        second = _sum(jnp.square(distance)) / count
        var = jnp.maximum(second - jnp.square(first), 0.0)
    inverse = jax.lax.rsqrt(var + epsilon)
    y = _per_channel(wide, mean, inverse * scale, bias)
    return (y, mean, var), (x, scale, mean, inverse)


def _normalize_backward(
    epsilon: float,
    residual: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, ...]:
    del epsilon
    x, scale, mean, inverse = residual
    g, g_mean, g_var = cotangents
    count = x.size // x.shape[-1]
    wide = x.astype(jnp.float32)
    d_bias = _sum(g)
    d_scale = _sum(g * (wide - _row(mean, wide))) * inverse
    # Three terms per pixel: the gradient itself, its mean, and its projection on x;
    # the cotangents of the two moments join the latter two.
    slope = (2 * g_var - inverse * inverse * scale * d_scale) / count
    level = (g_mean - inverse * scale * d_bias) / count
    d_x = g * _row(inverse * scale, g) + _per_channel(wide, mean, slope, level)
    return d_x.astype(x.dtype), d_scale, d_bias, jnp.zeros_like(mean)


_normalize = jax.custom_vjp(_normalize_with_moments, nondiff_argnums=(4,))
_normalize.defvjp(_normalize_forward, _normalize_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _normalize_tokens(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean, inverse = _token_moments(wide, epsilon)
    return (wide - mean) * (inverse * _row(scale, x)) + _row(bias, x)


@_normalize_tokens.defjvp
def _normalize_tokens_jvp(
    epsilon: float,
    primals: tuple[jax.Array, jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    x, scale, _ = primals
    mean, inverse = _token_moments(x.astype(jnp.float32), epsilon)
    # Kept for the transposed rule are its arguments, and nothing that it makes of them.
    rule = jax.checkpoint(_token_tangent, prevent_cse=False)
    y = _normalize_tokens(*primals, epsilon)
    return y, rule(x, scale, mean, inverse, *tangents)


def _token_tangent(
    x: jax.Array,
    scale: jax.Array,
    mean: jax.Array,
    inverse: jax.Array,
    d_x: jax.Array,
    d_scale: jax.Array,
    d_bias: jax.Array,
) -> jax.Array:
    normal = (x.astype(jnp.float32) - mean) * inverse
    d_x = d_x.astype(jnp.float32)
    level = jnp.mean(d_x, axis=-1, keepdims=True)
    slope = jnp.mean(d_x * normal, axis=-1, keepdims=True)
    d_normal = inverse * (d_x - level - normal * slope)
    return d_normal * _row(scale, x) + normal * _row(d_scale, x) + _row(d_bias, x)


def _token_moments(wide: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """The mean and the inverse deviation of every token."""
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    var = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    return mean, jax.lax.rsqrt(var + epsilon)
