"""Modules that methods train to carry student features to the teacher's shape.

They are called as blocks are, `module(*inputs, train)`, and compute in the dtype of
their first input with parameters in float32. Kernels and biases start as PyTorch's
defaults do unless a class says otherwise. Convolutions that a batch norm follows have
no bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jaxtyping import Array, Float

from jaxkd.layers.blocks import Maps, NewMaps
from jaxkd.layers.convolution import Conv
from jaxkd.layers.initializers import bias_uniform, fan_in_uniform
from jaxkd.layers.norm import BatchNorm
from jaxkd.numerics import adaptive_average_pool, resize_nearest

Size = tuple[int, int]


class ConvNorm(nn.Module):
    """1x1 convolution and batch norm, optionally with a ReLU.

    Attributes:
      features: output channels.
      relu: whether a ReLU follows.
      kernel_init: initialiser of the convolution.
    """

    features: int
    relu: bool = False
    kernel_init: Initializer = fan_in_uniform

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps:
        """Maps `[b, h, w, c]` to `[b, h, w, features]`."""
        x = _convolve(x, self.features, 1, name="conv", kernel_init=self.kernel_init)
        x = BatchNorm(dtype=x.dtype, name="norm")(x, train)
        return nn.relu(x) if self.relu else x


class HintRegressor(nn.Module):
    """FitNet's regressor: a convolution that ends at the teacher's size, norm, ReLU.

    The convolution has a bias and is chosen by the sizes. Equal: 1x1. Student twice as
    large: 3x3 with stride 2. Half as large: transposed 4x4 with stride 2. Otherwise,
    if larger: unpadded, with a kernel of `1 + student - teacher` pixels.

    Attributes:
      features: channels of the teacher.
      size: its height and width.

    Reference: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.
    """

    features: int
    size: Size

    @staticmethod
    def fits(size: Sequence[int], target: Sequence[int]) -> bool:
        """Whether there is a convolution from maps of `size` to maps of `target`."""
        larger = all(n >= m for n, m in zip(size, target, strict=True))
        return larger or tuple(target) == tuple(2 * n for n in size)

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps:
        """Maps `[b, h, w, c]` to `[b, *size, features]`."""
        x = self._to_size(x)
        return nn.relu(BatchNorm(dtype=x.dtype, name="norm")(x, train))

    def _to_size(self, x: jax.Array) -> jax.Array:
        height, width = x.shape[1:3]
        if not self.fits((height, width), self.size):
            raise ValueError(
                f"no convolution of the hint's regressor leads from maps of "
                f"{height}x{width} to {self.size[0]}x{self.size[1]}"
            )
        if (height, width) == tuple(2 * n for n in self.size):
            return _convolve(
                x, self.features, 3, name="conv", stride=2, padding=1, use_bias=True
            )
        if self.size == (2 * height, 2 * width):
            # Fans of a transposed kernel are counted the other way round in PyTorch.
            return nn.ConvTranspose(
                self.features,
                (4, 4),
                strides=(2, 2),
                padding=((2, 2), (2, 2)),
                kernel_init=nn.initializers.variance_scaling(
                    1 / 3, "fan_out", "uniform"
                ),
                bias_init=bias_uniform(16 * self.features),
                dtype=x.dtype,
                name="conv",
            )(x)
        kernel = (1 + height - self.size[0], 1 + width - self.size[1])
        return _convolve(x, self.features, kernel, name="conv", use_bias=True)


class VariationalRegressor(nn.Module):
    """VID's Gaussian: a mean from three 1x1 convolutions, a variance per channel.

    Attributes:
      features: channels of the teacher, also those in between.
      variance: initial variance of every channel.
      epsilon: lower bound of the variances.
      train_variance: whether the variances are parameters; otherwise they stay in the
        collection "constants".

    Reference: Ahn et al., "Variational Information Distillation for Knowledge
    Transfer", CVPR 2019.
    """

    features: int
    variance: float = 5.0
    epsilon: float = 1e-5
    train_variance: bool = True

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> tuple[NewMaps, Float[Array, "c"]]:
        """Returns the mean `[b, h, w, features]` and `log_scale` `[features]`.

        The variance is `softplus(log_scale) + epsilon`.
        """
        del train
        for i in range(3):
            x = nn.relu(x) if i else x
            x = _convolve(x, self.features, 1, name=f"conv{i}")
        rest = self.variance - self.epsilon
        # The inverse of softplus, in a form that does not overflow.
        initial = rest + math.log(-math.expm1(-rest))

        def initialize() -> jax.Array:
            return jnp.full((self.features,), initial, jnp.float32)

        if self.train_variance:
            return x, self.param("log_scale", lambda key: initialize())
        return x, self.variable("constants", "log_scale", initialize).value


class MaskedGenerator(nn.Module):
    """Rebuilds the teacher's map from a masked map of the student.

    A 1x1 convolution to the teacher's channels where they differ, the mask, and
    3x3 - ReLU - 3x3, all with biases.

    Attributes:
      features: channels of the teacher.
      learned_fill: whether a learned vector, zero at first, takes the place of what
        the mask removes; otherwise zeros do.

    Reference: Yang et al., "Masked Generative Distillation", ECCV 2022.
    """

    features: int
    learned_fill: bool = False

    @nn.compact
    def __call__(
        self, x: Maps, keep: Float[Array, "#b mask_h mask_w mask_c"], train: bool
    ) -> NewMaps:
        """Maps `[b, h, w, c]` to `[b, h, w, features]`.

        Args:
          x: the student's map.
          keep: 1 where it is kept, 0 where it is removed; broadcast against
            `[b, h, w, features]`.
          train: unused.
        """
        del train
        if x.shape[-1] != self.features:
            x = _convolve(x, self.features, 1, name="align", use_bias=True)
        keep = keep.astype(x.dtype)
        x = x * keep
        if self.learned_fill:
            zeros = nn.initializers.zeros
            shape = (1, 1, 1, self.features)
            fill = self.param("fill", zeros, shape, jnp.float32)
            x = x + (1 - keep) * fill.astype(x.dtype)
        for i in range(2):
            x = nn.relu(x) if i else x
            x = _convolve(
                x, self.features, 3, name=f"conv{i}", padding=1, use_bias=True
            )
        return x


class Projector(nn.Module):
    """SimKD's projector: 1x1, 3x3 and 1x1 convolutions, each with norm and ReLU.

    Attributes:
      features: channels of the teacher.
      factor: how many times narrower the layers in between are.
      size: height and width of the teacher's map; a larger map is average-pooled first.

    Reference: Chen et al., "Knowledge Distillation with the Reused Teacher
    Classifier", CVPR 2022.
    """

    features: int
    factor: int
    size: Size

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps:
        """Maps `[b, h, w, c]` to `[b, min(h, size), min(w, size), features]`."""
        x = shrink_to(x, self.size)
        narrow = self.features // self.factor
        layers = [(narrow, 1), (narrow, 3), (self.features, 1)]
        for i, (features, kernel) in enumerate(layers):
            x = _convolve(x, features, kernel, name=f"conv{i}", padding=kernel // 2)
            x = nn.relu(BatchNorm(dtype=x.dtype, name=f"norm{i}")(x, train))
        return x


class ReviewBlock(nn.Module):
    """ReviewKD's attention-based fusion of a map with that of the deeper block.

        x = norm(conv1x1(map))
        a = sigmoid(conv1x1([x, deeper])),   x = x * a_0 + deeper * a_1
        output = norm(conv3x3(x))

    Kernels of the normalised convolutions have variance `1 / fan_in`.

    Attributes:
      mid_features: channels of `x`.
      features: channels of the teacher.
      size: height and width of the teacher's map.
    """

    mid_features: int
    features: int
    size: Size

    @nn.compact
    def __call__(
        self,
        x: Maps,
        deeper: Float[Array, "b deeper_h deeper_w mid"] | None,
        train: bool,
    ) -> tuple[NewMaps, Float[Array, "b new_height new_width mid"]]:
        """Returns the output `[b, *size, features]` and `x` for the next block."""
        x = self._conv_norm(x, self.mid_features, 1, "1", train)
        if deeper is not None:
            deeper = resize_nearest(deeper, x.shape[1:3]).astype(x.dtype)
            both = jnp.concatenate([x, deeper], axis=-1)
            attention = nn.sigmoid(
                _convolve(both, 2, 1, name="attention", use_bias=True)
            )
            x = x * attention[..., :1] + deeper * attention[..., 1:]
        x = resize_nearest(x, self.size)
        return self._conv_norm(x, self.features, 3, "2", train), x

    def _conv_norm(
        self, x: jax.Array, features: int, kernel: int, name: str, train: bool
    ) -> jax.Array:
        x = _convolve(
            x,
            features,
            kernel,
            name=f"conv{name}",
            padding=kernel // 2,
            kernel_init=nn.initializers.lecun_uniform(),
        )
        return BatchNorm(dtype=x.dtype, name=f"norm{name}")(x, train)


class Review(nn.Module):
    """ReviewKD's chain of blocks, from the deepest map to the shallowest.

    Attributes:
      mid_features: channels that the blocks hand on.
      features: channels of the teacher's maps, from the shallowest to the deepest.
      sizes: their heights and widths.

    Reference: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021.
    """

    mid_features: int
    features: Sequence[int]
    sizes: Sequence[Size]

    @nn.compact
    def __call__(self, *maps_and_train: Any) -> list[jax.Array]:
        """Maps, from the shallowest to the deepest, to outputs in the same order.

        Args:
          *maps_and_train: a map `[b, h, w, c]` per block, and then `train`.
        """
        *maps, train = maps_and_train
        outputs, deeper = [], None
        blocks = zip(maps, self.features, self.sizes, strict=True)
        for i, (x, features, size) in enumerate(reversed(list(blocks))):
            block = ReviewBlock(self.mid_features, features, size, name=f"block{i}")
            output, deeper = block(x, deeper, train)
            outputs.append(output)
        return outputs[::-1]


def shrink_to(
    x: Float[Array, "*lead h w c"], size: Sequence[int]
) -> Float[Array, "*lead new_h new_w c"]:
    """Average-pools maps along the axes in which they exceed `size`."""
    height, width = x.shape[-3:-1]
    return adaptive_average_pool(x, (min(height, size[0]), min(width, size[1])))


def token_grid(tokens: int) -> tuple[int, int] | None:
    """Reads a number of tokens as up to two prefix tokens and a square grid.

    Returns:
      `(prefix, side)`, or None if the number is no such sum.

    >>> token_grid(197), token_grid(16), token_grid(12)
    ((1, 14), (0, 4), None)
    """
    side = math.isqrt(tokens)
    prefix = tokens - side * side
    return (prefix, side) if prefix <= 2 and side > 0 else None


def tokens_to_map(
    x: Float[Array, "*lead tokens c"],
) -> Float[Array, "*lead side side c"]:
    """Drops class tokens and lays the others, in row-major order, on their grid.

    Raises:
      ValueError: the tokens are no square, see `token_grid`.
    """
    grid = token_grid(x.shape[-2])
    if grid is None:
        raise ValueError(f"{x.shape[-2]} tokens are no square grid with 0-2 prefixes")
    prefix, side = grid
    return x[..., prefix:, :].reshape(*x.shape[:-2], side, side, x.shape[-1])


def map_to_tokens(
    x: Float[Array, "*lead h w c"],
) -> Float[Array, "*lead tokens c"]:
    """Pixels in row-major order as tokens."""
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])


def _convolve(
    x: jax.Array,
    features: int,
    kernel_size: int | Size,
    *,
    name: str,
    stride: int = 1,
    padding: int = 0,
    use_bias: bool = False,
    kernel_init: Initializer = fan_in_uniform,
) -> jax.Array:
    size = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    return Conv(
        features,
        size,
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=bias_uniform(math.prod(size) * x.shape[-1]),
        dtype=x.dtype,
        name=name,
    )(x)
