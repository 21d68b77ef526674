"""Parts that several families of classifiers share.

A `ConvNorm` ends with its batch norm and leaves the ReLU to the caller, who can hand
out the value before it.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.layers import BatchNorm, kaiming_normal
from jaxkd.layers.convolution import Conv


class ConvNorm(nn.Module):
    """A convolution padded by half its odd kernel, and a batch norm; no activation.

    Attributes:
      features: output channels.
      kernel_size: side of the kernel.
      stride: stride of the convolution.
      groups: groups of channels; as many as input channels for a depthwise one.
      use_bias: whether the convolution adds a bias, which starts at zero.
      kernel_init: initialiser of the kernel.
      dtype: dtype of the computation.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    groups: int = 1
    use_bias: bool = False
    kernel_init: Any = kaiming_normal
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool
    ) -> Float[Array, "b new_h new_w new_c"]:
        """Maps `[b, h, w, c]` to `[b, ceil(h/stride), ceil(w/stride), features]`."""
        half = self.kernel_size // 2
        x = Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            strides=(self.stride, self.stride),
            padding=((half, half), (half, half)),
            feature_group_count=self.groups,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        return BatchNorm(dtype=self.dtype, name="norm")(x, train)


def channel_shuffle(x: Float[Array, "*lead c"], groups: int) -> Float[Array, "*lead c"]:
    """Interleaves the channels of `groups` equal groups (Zhang et al., 2018).

    >>> channel_shuffle(jnp.arange(6.0), 2).tolist()
    [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    """
    *lead, channels = x.shape
    x = x.reshape(*lead, groups, channels // groups)
    return jnp.swapaxes(x, -1, -2).reshape(*lead, channels)
