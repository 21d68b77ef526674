"""U-Net, the plain encoder-decoder with skip connections.

As published with HLFD: five levels of (3x3 convolution with bias, batch norm, ReLU)
twice, 2x2 max-pooling, and up-steps of nearest-neighbour doubling, convolution, batch
norm and ReLU; a decoder node sees `[skip, up]`. 34,525,954 parameters for one input
channel and two classes. Height and width must be multiples of 16.

Taps at width factor 1 for images of height H (width alike):

    e1 H 64 | e2 H/2 128 | e3 H/4 256 | e4 H/8 512 | e5 H/16 1024
    d5 H/8 512 | d4 H/4 256 | d3 H/2 128 | d2 H 64 | out H classes (the logits)
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxkd.layers import (
    ConvNormRelu,
    DoubleConv,
    Outputs,
    Remat,
    bias_uniform,
    fan_in_uniform,
    max_pool,
    maybe_remat,
)
from jaxkd.models._options import (
    check_images,
    checked_classes,
    checked_dtype,
    scaled,
)
from jaxkd.models.registry import register
from jaxkd.numerics import product_in_float32, resize_nearest

WIDTHS = (64, 128, 256, 512, 1024)
"""Channels per level of a U-Net and a U-Net++ at width factor 1."""


class UNet(nn.Module):
    """U-Net (see the module docstring for its taps).

    Attributes:
      num_classes: channels of the logits.
      widths: channels per level, finest first.
      dtype: dtype of the computation.
      remat: what the backward pass recomputes, see `jaxkd.layers.Remat`.

    Reference: Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image
    Segmentation", MICCAI 2015.
    """

    num_classes: int
    widths: Sequence[int] = WIDTHS
    dtype: Any = jnp.float32
    remat: Remat = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool = False
    ) -> Outputs:
        """Segments images `[b, h, w, c]` into logits `[b, h, w, classes]`."""
        levels = len(self.widths)
        check_images(images, network="unet", multiple=2 ** (levels - 1))
        node = maybe_remat(DoubleConv, self.remat)
        unit = maybe_remat(ConvNormRelu, self.remat)
        taps = collections.OrderedDict()
        x = images.astype(self.dtype)
        for level, width in enumerate(self.widths, start=1):
            if level > 1:
                x = max_pool(x, window=2, stride=2)
            x = node(width, dtype=self.dtype, name=f"encoder{level}")(x, train)
            taps[f"e{level}"] = x
        for level in range(levels, 1, -1):
            width = self.widths[level - 2]
            skip = taps[f"e{level - 1}"]
            x = resize_nearest(x, skip.shape[1:3])
            x = unit(width, dtype=self.dtype, name=f"up{level}")(x, train)
            x = jnp.concatenate([skip, x], axis=-1)
            x = node(width, dtype=self.dtype, name=f"decoder{level}")(x, train)
            taps[f"d{level}"] = x
        taps["out"] = head(x, self.num_classes)
        return Outputs(logits=taps["out"], taps=taps)


def head(x: Float[Array, "b h w c"], num_classes: int) -> Float32[Array, "b h w k"]:
    """The last 1x1 convolution of a segmentation network, with a float32 result.

    Features, kernel and bias are as narrow as the network computes: this is its largest
    map, of which no float32 copy is made. To be called inside a compact module; its
    parameters are named "head".
    """
    convolution = nn.Conv(
        num_classes,
        (1, 1),
        kernel_init=fan_in_uniform,
        bias_init=bias_uniform(x.shape[-1]),
        dtype=x.dtype,
        conv_general_dilated=_pointwise,
        name="head",
    )
    return convolution(x)


def _pointwise(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    return product_in_float32(x, kernel[0, 0])


@register()
def unet(
    *,
    num_classes: int,
    width_factor: float = 1.0,
    dtype: Any = jnp.float32,
    remat: Remat = False,
) -> UNet:
    """The U-Net of HLFD's code; options as in `jaxkd.models.registry`."""
    return UNet(
        num_classes=checked_classes(num_classes),
        widths=scaled(WIDTHS, width_factor),
        dtype=checked_dtype(dtype),
        remat=remat,
    )
