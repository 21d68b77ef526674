"""MobileNetV2: inverted residual blocks with linear bottlenecks.

`mobilenetv2` is torchvision's for ImageNet, with ReLU6. Its `width_factor` follows the
published rule: widths are multiples of 8 (at least 8, and never more than a tenth below
the exact value), and the last convolution has 1280 channels or more.

`mobilenetv2_cifar` is the one of half width behind the published CIFAR-100 tables: ReLU
in place of ReLU6, the first block expands by a 1x1 convolution of ratio 1, and the
second stage has stride 1. All its widths are multiplied by `width_factor`.

Taps at width factor 1 for images of height H (rounded up), ImageNet | CIFAR:

    stem    H/2  32, after the activation   | H/2   16
    stage1  H/4  24, the end of stride 4    | H/2   12
    stage2  H/8  32                         | H/4   16
    stage3  H/16 96                         | H/8   48
    stage4  H/32 320                        | H/16 160
    pooled, the mean of the last convolution's 1280 channels (after dropout, if any)

The stages are linear: they end with a batch norm or the sum of one and a shortcut, so
that `stage{i}_pre` equals `stage{i}`. `norms["stage{i}_pre"]` is that batch norm.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.layers import Outputs, Remat, maybe_remat
from jaxkd.layers.dense import Dense
from jaxkd.models._options import (
    check_images,
    checked_classes,
    checked_dtype,
    checked_factor,
    checked_rate,
    scaled,
)
from jaxkd.models._units import ConvNorm
from jaxkd.models.registry import register

# Per group of blocks: expansion, output channels, blocks, stride of the first block.
IMAGENET = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
CIFAR = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)
# The groups at whose end the size is about to halve, and the last one.
TAPPED = {2: "stage1", 3: "stage2", 5: "stage3", 7: "stage4"}


class InvertedResidual(nn.Module):
    """A 1x1 convolution that widens, a depthwise 3x3 one, and a linear 1x1 one.

    The input is added to the output at stride 1 if their channels agree.

    Attributes:
      features: output channels.
      stride: stride of the depthwise convolution.
      expansion: hidden channels per input channel.
      expands: whether the first convolution is there.
      activation: the activation after the first two convolutions.
      dtype: dtype of the computation.

    Reference: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    CVPR 2018.
    """

    features: int
    stride: int
    expansion: int
    expands: bool
    activation: Callable[[jax.Array], jax.Array]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool
    ) -> Float[Array, "b new_h new_w new_c"]:
        """Maps `[b, h, w, c]` to `[b, ceil(h/stride), ceil(w/stride), features]`."""
        y, dtype = x, self.dtype
        hidden = self.expansion * x.shape[-1]
        if self.expands:
            expand = ConvNorm(hidden, kernel_size=1, dtype=dtype, name="expand")
            y = self.activation(expand(y, train))
        depthwise = ConvNorm(
            hidden, stride=self.stride, groups=hidden, dtype=dtype, name="depthwise"
        )
        y = self.activation(depthwise(y, train))
        y = ConvNorm(self.features, kernel_size=1, dtype=dtype, name="project")(
            y, train
        )
        adds = self.stride == 1 and x.shape[-1] == self.features
        return x + y if adds else y


class MobileNetV2(nn.Module):
    """A convolution, inverted residual blocks, a 1x1 convolution, a linear classifier.

    Attributes:
      num_classes: number of logits.
      stem_width: channels of the first convolution, whose stride is 2.
      groups: per group of blocks the expansion, output channels, number of blocks and
        stride of the first block.
      last_width: channels of the last convolution.
      activation: the activation.
      expands_all: whether blocks of expansion 1 have the first convolution as well.
      dropout: rate of dropout before the classifier.
      dtype: dtype of the computation.
      remat: what the backward pass recomputes, see `jaxkd.layers.Remat`.

    Reference: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    CVPR 2018.
    """

    num_classes: int
    stem_width: int
    groups: Sequence[tuple[int, int, int, int]]
    last_width: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu6
    expands_all: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: Remat = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool = False
    ) -> Outputs:
        """Classifies images `[b, h, w, c]` into logits `[b, classes]`."""
        check_images(images, network="mobilenetv2")
        block = maybe_remat(InvertedResidual, self.remat)
        x = images.astype(self.dtype)
        stem = ConvNorm(self.stem_width, stride=2, dtype=self.dtype, name="stem")
        x = self.activation(stem(x, train))
        taps: dict[str, jax.Array] = collections.OrderedDict(stem=x)
        norms = {}
        for group, (expansion, width, blocks, stride) in enumerate(self.groups, 1):
            for i in range(blocks):
                x = block(
                    width,
                    stride=1 if i else stride,
                    expansion=expansion,
                    expands=self.expands_all or expansion > 1,
                    activation=self.activation,
                    dtype=self.dtype,
                    name=f"group{group}_block{i + 1}",
                )(x, train)
            if group in TAPPED:
                stage = TAPPED[group]
                taps[f"{stage}_pre"] = taps[stage] = x
                parameters = self.get_variable("params", f"group{group}_block{blocks}")
                norms[f"{stage}_pre"] = parameters["project"]["norm"]
        last = ConvNorm(self.last_width, kernel_size=1, dtype=self.dtype, name="last")
        x = self.activation(last(x, train))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        taps["pooled"] = nn.Dropout(self.dropout)(x, deterministic=not train)
        dense = Dense(
            self.num_classes, kernel_init=nn.initializers.normal(0.01), name="head"
        )
        logits = dense(taps["pooled"])
        head = self.get_variable("params", "head")
        return Outputs(logits=logits, taps=taps, head=head, norms=norms)


def _multiple_of_8(width: float) -> int:
    """The nearest multiple of 8, but at least 8 and nine tenths of `width`."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * width else nearest


@register()
def mobilenetv2(
    *,
    num_classes: int,
    width_factor: float = 1.0,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    remat: Remat = False,
) -> MobileNetV2:
    """MobileNetV2 for ImageNet, as in torchvision."""
    width_factor = checked_factor(width_factor)
    return MobileNetV2(
        num_classes=checked_classes(num_classes),
        stem_width=_multiple_of_8(32 * width_factor),
        groups=tuple(
            (expansion, _multiple_of_8(width * width_factor), blocks, stride)
            for expansion, width, blocks, stride in IMAGENET
        ),
        last_width=_multiple_of_8(1280 * max(1.0, width_factor)),
        dropout=checked_rate("dropout", dropout),
        dtype=checked_dtype(dtype),
        remat=remat,
    )


@register()
def mobilenetv2_cifar(
    *,
    num_classes: int,
    width_factor: float = 1.0,
    dtype: Any = jnp.float32,
    remat: Remat = False,
) -> MobileNetV2:
    """MobileNetV2 of half width for 32x32 images."""
    stem_width, last_width, *widths = scaled(
        (16, 1280, *(width for _, width, _, _ in CIFAR)), width_factor
    )
    return MobileNetV2(
        num_classes=checked_classes(num_classes),
        stem_width=stem_width,
        groups=tuple(
            (expansion, width, blocks, stride)
            for (expansion, _, blocks, stride), width in zip(CIFAR, widths, strict=True)
        ),
        last_width=last_width,
        activation=nn.relu,
        expands_all=True,
        dtype=checked_dtype(dtype),
        remat=remat,
    )
