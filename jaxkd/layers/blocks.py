"""Blocks of convolutional networks: residual, pre-activated and plain.

All take maps `[batch, height, width, channels]` and a Python bool `train`, by position
so that `flax.linen.remat` can treat it as static. Convolutions pad symmetrically (a
3x3 kernel by one pixel on each side, whatever the stride), which `padding="SAME"`
does not at stride 2. Parameters are float32; `dtype` is that of the computation.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.layers.convolution import Conv
from jaxkd.layers.initializers import bias_uniform, fan_in_uniform, kaiming_normal
from jaxkd.layers.norm import BatchNorm

Maps = Float[Array, "batch height width channels"]
NewMaps = Float[Array, "batch new_height new_width new_channels"]


def conv(
    features: int, *, kernel_size: int = 3, stride: int = 1, dtype: Any, name: str
) -> nn.Conv:
    """A Kaiming-initialised convolution without bias, padded by half its odd kernel."""
    half = kernel_size // 2
    return Conv(
        features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=((half, half), (half, half)),
        use_bias=False,
        kernel_init=kaiming_normal,
        dtype=dtype,
        name=name,
    )


def biased_conv(
    features: int, *, in_features: int, kernel_size: int = 3, dtype: Any, name: str
) -> nn.Conv:
    """A padded convolution with bias, both drawn uniformly within `1/sqrt(fan_in)`."""
    half = kernel_size // 2
    return Conv(
        features,
        (kernel_size, kernel_size),
        padding=((half, half), (half, half)),
        kernel_init=fan_in_uniform,
        bias_init=bias_uniform(kernel_size**2 * in_features),
        dtype=dtype,
        name=name,
    )


class ConvNormRelu(nn.Module):
    """3x3 convolution with bias, batch norm, ReLU: the unit of a U-Net.

    Attributes:
      features: output channels.
      dtype: dtype of the computation.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps:
        """Maps `[b, h, w, c]` to `[b, h, w, features]`."""
        x = biased_conv(
            self.features, in_features=x.shape[-1], dtype=self.dtype, name="conv"
        )(x)
        return nn.relu(BatchNorm(dtype=self.dtype, name="norm")(x, train))


class DoubleConv(nn.Module):
    """Two units of convolution, batch norm and ReLU: a node of a U-Net.

    Attributes:
      features: output channels of both.
      dtype: dtype of the computation.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps:
        """Maps `[b, h, w, c]` to `[b, h, w, features]`."""
        x = ConvNormRelu(self.features, dtype=self.dtype, name="unit1")(x, train)
        return ConvNormRelu(self.features, dtype=self.dtype, name="unit2")(x, train)


class _Shortcut(nn.Module):
    """The identity, or a 1x1 convolution and batch norm where shapes change."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps:
        if self.stride == 1 and x.shape[-1] == self.features:
            return x
        x = conv(
            self.features,
            kernel_size=1,
            stride=self.stride,
            dtype=self.dtype,
            name="conv",
        )(x)
        return BatchNorm(dtype=self.dtype, name="norm")(x, train)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions.

    Attributes:
      features: output channels.
      stride: stride of the first convolution and of the shortcut.
      dtype: dtype of the computation.
      skip: whether there is a shortcut; without, the block is `relu(F(x))`.
      with_pre: whether to return `(output, pre)`, with `pre` the output before its
        ReLU.

    Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    last_norm: ClassVar[str] = "norm2"

    features: int
    stride: int = 1
    dtype: Any = jnp.float32
    skip: bool = True
    with_pre: bool = False

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps | tuple[NewMaps, NewMaps]:
        """Maps `[b, h, w, c]` to `[b, ceil(h/stride), ceil(w/stride), features]`."""
        dtype = self.dtype
        y = conv(self.features, stride=self.stride, dtype=dtype, name="conv1")(x)
        y = nn.relu(BatchNorm(dtype=dtype, name="norm1")(y, train))
        y = conv(self.features, dtype=dtype, name="conv2")(y)
        y = BatchNorm(dtype=dtype, name="norm2")(y, train)
        if self.skip:
            shortcut = _Shortcut(self.features, self.stride, dtype, name="shortcut")
            y = y + shortcut(x, train)
        return (nn.relu(y), y) if self.with_pre else nn.relu(y)


class Bottleneck(nn.Module):
    """Residual block of a 1x1, a 3x3 and a widening 1x1 convolution.

    The stride is in the 3x3 convolution ("version 1.5"), as in torchvision.

    Attributes:
      features: output channels, four times those of the 3x3 convolution.
      stride: stride of the 3x3 convolution and of the shortcut.
      dtype: dtype of the computation.
      skip: whether there is a shortcut; without, the block is `relu(F(x))`.
      with_pre: whether to return `(output, pre)`, with `pre` the output before its
        ReLU.

    Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    last_norm: ClassVar[str] = "norm3"

    features: int
    stride: int = 1
    dtype: Any = jnp.float32
    skip: bool = True
    with_pre: bool = False

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps | tuple[NewMaps, NewMaps]:
        """Maps `[b, h, w, c]` to `[b, ceil(h/stride), ceil(w/stride), features]`."""
        dtype, narrow = self.dtype, self.features // 4
        y = conv(narrow, kernel_size=1, dtype=dtype, name="conv1")(x)
        y = nn.relu(BatchNorm(dtype=dtype, name="norm1")(y, train))
        y = conv(narrow, stride=self.stride, dtype=dtype, name="conv2")(y)
        y = nn.relu(BatchNorm(dtype=dtype, name="norm2")(y, train))
        y = conv(self.features, kernel_size=1, dtype=dtype, name="conv3")(y)
        y = BatchNorm(dtype=dtype, name="norm3")(y, train)
        if self.skip:
            shortcut = _Shortcut(self.features, self.stride, dtype, name="shortcut")
            y = y + shortcut(x, train)
        return (nn.relu(y), y) if self.with_pre else nn.relu(y)


class PreActivationBlock(nn.Module):
    """Residual block with batch norm and ReLU before each 3x3 convolution.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input;
    elsewhere it is the raw input.

    Attributes:
      features: output channels.
      stride: stride of the first convolution and of the shortcut.
      dtype: dtype of the computation.
      with_pre: whether to return `(output, pre)`, with `pre` the output of the first
        batch norm, before its ReLU.

    Reference: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016.
    """

    features: int
    stride: int = 1
    dtype: Any = jnp.float32
    with_pre: bool = False

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps | tuple[NewMaps, Maps]:
        """Maps `[b, h, w, c]` to `[b, ceil(h/stride), ceil(w/stride), features]`."""
        dtype = self.dtype
        pre = BatchNorm(dtype=dtype, name="norm1")(x, train)
        active = nn.relu(pre)
        y = conv(self.features, stride=self.stride, dtype=dtype, name="conv1")(active)
        y = nn.relu(BatchNorm(dtype=dtype, name="norm2")(y, train))
        y = conv(self.features, dtype=dtype, name="conv2")(y)
        if x.shape[-1] != self.features or self.stride != 1:
            x = conv(
                self.features,
                kernel_size=1,
                stride=self.stride,
                dtype=dtype,
                name="shortcut",
            )(active)
        return (x + y, pre) if self.with_pre else x + y
