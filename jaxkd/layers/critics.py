"""A critic of segmentation maps: one number that says how real a map looks.

Strided convolutions with spectral normalisation, self-attention in the two deepest
maps, as in SAGAN. Everything in it is plain JAX, twice differentiable in reverse mode,
which a gradient penalty needs.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.layers.blocks import Maps, NewMaps
from jaxkd.layers.convolution import Conv
from jaxkd.layers.initializers import bias_uniform, fan_in_uniform
from jaxkd.numerics import l2_normalize


class SpectralConv(nn.Module):
    """4x4 convolution of stride 2, its kernel divided by the largest singular value.

    The singular value comes from one step of power iteration per call. The vector that
    the iteration starts from is in the collection "spectral"; calls with `train` move
    it on.

    Attributes:
      features: output channels.

    Reference: Miyato et al., "Spectral Normalization for Generative Adversarial
    Networks", ICLR 2018.
    """

    features: int

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps:
        """Maps `[b, h, w, c]` to `[b, h // 2, w // 2, features]`."""
        fan_in = 16 * x.shape[-1]
        shape = (4, 4, x.shape[-1], self.features)
        kernel = self.param("kernel", fan_in_uniform, shape, jnp.float32)
        bias = self.param("bias", bias_uniform(fan_in), (self.features,), jnp.float32)
        start = self.variable("spectral", "vector", self._draw)
        matrix = jax.lax.stop_gradient(kernel.reshape(fan_in, self.features))
        left = l2_normalize(matrix @ start.value)
        right = l2_normalize(left @ matrix)
        if train and not self.is_initializing():
            start.value = right
        sigma = left @ kernel.reshape(fan_in, self.features) @ right
        kernel = kernel / jnp.where(sigma > 0, sigma, 1.0)
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(2, 2),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias.reshape(1, 1, 1, -1)

    def _draw(self) -> Float[Array, "features"]:
        key = self.make_rng("params")
        return l2_normalize(jax.random.normal(key, (self.features,), jnp.float32))


class SelfAttention(nn.Module):
    """Adds to each pixel a mixture of all pixels; its learned share starts at 0.

    Reference: Zhang et al., "Self-Attention Generative Adversarial Networks", ICML
    2019.
    """

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps:
        """Maps `[b, h, w, c]` to maps of that shape."""
        del train
        batch, height, width, channels = x.shape
        pixels = x.reshape(batch, height * width, channels)

        def project(features: int, name: str) -> jax.Array:
            return nn.Dense(
                features,
                kernel_init=fan_in_uniform,
                bias_init=bias_uniform(channels),
                name=name,
            )(pixels)

        narrow = max(channels // 8, 1)
        query, key = project(narrow, "query"), project(narrow, "key")
        attention = jax.nn.softmax(jnp.einsum("bpc,bnc->bpn", query, key), axis=-1)
        mixed = jnp.einsum("bpn,bnc->bpc", attention, project(channels, "value"))
        share = self.param("share", nn.initializers.zeros, (1, 1, 1), jnp.float32)
        return (pixels + share * mixed).reshape(x.shape)


class Critic(nn.Module):
    """Scores maps, one number per image, in float32.

    The input is standardised per channel over the batch; then follow up to four
    halving convolutions, as long as at least 4x4 pixels remain, and an unpadded 4x4
    convolution whose values are averaged. Channels double at every layer.

    Attributes:
      width: channels of the first layer.
    """

    width: int = 64

    @staticmethod
    def depth(height: int, width: int) -> int:
        """How many halving convolutions a map of this size passes.

        >>> Critic.depth(65, 65), Critic.depth(20, 512), Critic.depth(7, 7)
        (4, 2, 0)
        """
        return min(4, max((min(height, width) // 4).bit_length() - 1, 0))

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> Float[Array, "batch"]:
        """Maps `[b, h, w, c]` to scores `[b]`.

        Raises:
          ValueError: maps smaller than 8x8.
        """
        depth = self.depth(*x.shape[1:3])
        if depth == 0:
            raise ValueError(
                f"maps of {x.shape[1]}x{x.shape[2]} are too small for a critic; it "
                f"needs at least 8x8"
            )
        x = self._standardize(x.astype(jnp.float32))
        for i in range(depth):
            x = SpectralConv(self.width * 2**i, name=f"conv{i}")(x, train)
            x = nn.leaky_relu(x, 0.1)
            if i >= depth - 2:
                x = SelfAttention(name=f"attention{i}")(x, train)
        x = Conv(
            1,
            (4, 4),
            padding="VALID",
            kernel_init=fan_in_uniform,
            bias_init=bias_uniform(16 * x.shape[-1]),
            name="score",
        )(x)
        return jnp.mean(x, axis=(1, 2, 3))

    def _standardize(self, x: jax.Array) -> jax.Array:
        """Batch norm that always uses the batch, so there are no running statistics."""
        shape = (1, 1, 1, x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        mean = jnp.mean(x, axis=(0, 1, 2), keepdims=True)
        centred = x - mean
        variance = jnp.mean(jnp.square(centred), axis=(0, 1, 2), keepdims=True)
        return centred * jax.lax.rsqrt(variance + 1e-5) * scale + bias
