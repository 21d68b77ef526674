"""VGG networks with batch norm, for 32x32 and for ImageNet images.

`vgg8`, `vgg11`, `vgg13`, `vgg16`, `vgg19` are those behind the published CIFAR-100
tables: five stages of 3x3 convolutions with widths 64, 128, 256, 512, 512, global
average pooling and one linear layer. `vgg11_imagenet` to `vgg19_imagenet` are
torchvision's `vgg11_bn` to `vgg19_bn`: the last stage is pooled to 7x7 cells and
classified by two hidden layers of 4096 and a linear one. The classifier's rows follow
the order height, width, channel.

Taps for images of height H; a 2x2 max-pool of stride 2 (rounding down) follows every
tap, except that the CIFAR networks pool neither after stage4 nor, for images below 64
pixels, after stage3:

    stem    first stage of convolutions  H     64 channels
    stage1  H/2 128 | stage2 H/4 256 | stage3 H/8 512
    stage4  H/8 512 (CIFAR below 64 pixels), else H/16
    pooled  `[batch, channels]`, the input of the last linear layer: the mean of stage4,
            or the second hidden layer (after dropout, if any)

`stage{i}_pre` before each `stage{i}` is the batch norm's output before the ReLU.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.layers import Outputs, Remat, max_pool, maybe_remat
from jaxkd.layers.dense import Dense
from jaxkd.models._options import (
    check_images,
    checked_classes,
    checked_dtype,
    checked_rate,
    scaled,
)
from jaxkd.models._units import ConvNorm
from jaxkd.models.registry import register
from jaxkd.numerics import adaptive_average_pool

WIDTHS = (64, 128, 256, 512, 512)
HIDDEN = (4096, 4096)
SIZES = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}

_small_normal = nn.initializers.normal(0.01)


class VGG(nn.Module):
    """Stages of 3x3 convolutions and a classifier of one or more linear layers.

    Attributes:
      num_classes: number of logits.
      stage_sizes: convolutions per stage, the first of which is the stem.
      stage_widths: output channels per stage.
      hidden: widths of hidden linear layers; with none, the last stage is averaged
        and classified directly, as on CIFAR.
      dropout: rate of dropout after each hidden layer.
      dtype: dtype of the computation.
      remat: what the backward pass recomputes, see `jaxkd.layers.Remat`.

    Reference: Simonyan and Zisserman, "Very Deep Convolutional Networks for
    Large-Scale Image Recognition", ICLR 2015.
    """

    num_classes: int
    stage_sizes: Sequence[int]
    stage_widths: Sequence[int] = WIDTHS
    hidden: Sequence[int] = ()
    dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: Remat = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool = False
    ) -> Outputs:
        """Classifies images `[b, h, w, c]` into logits `[b, classes]`."""
        check_images(images, network="vgg")
        unit = maybe_remat(ConvNorm, self.remat)
        pools_all = bool(self.hidden) or min(images.shape[1:3]) >= 64
        x = images.astype(self.dtype)
        taps: dict[str, jax.Array] = collections.OrderedDict()
        norms = {}
        stages = zip(self.stage_sizes, self.stage_widths, strict=True)
        for stage, (size, width) in enumerate(stages):
            name = f"stage{stage}" if stage else "stem"
            if stage and (pools_all or stage < len(self.stage_sizes) - 1):
                x = max_pool(x, window=2, stride=2)
            *convs, last = (
                unit(width, use_bias=True, dtype=self.dtype, name=f"{name}_conv{i + 1}")
                for i in range(size)
            )
            for conv in convs:
                x = nn.relu(conv(x, train))
            pre = last(x, train)
            x = nn.relu(pre)
            if stage:
                taps[f"{name}_pre"] = pre
                parameters = self.get_variable("params", f"{name}_conv{size}")
                norms[f"{name}_pre"] = parameters["norm"]
            taps[name] = x
        taps["pooled"] = self._pooled(x, train)
        dense = Dense(self.num_classes, kernel_init=_small_normal, name="head")
        logits = dense(taps["pooled"])
        head = self.get_variable("params", "head")
        return Outputs(logits=logits, taps=taps, head=head, norms=norms)

    def _pooled(
        self, x: Float[Array, "b h w c"], train: bool
    ) -> Float[Array, "b features"]:
        if not self.hidden:
            return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        x = max_pool(x, window=2, stride=2)
        x = adaptive_average_pool(x, 7)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden, start=1):
            dense = Dense(
                width, kernel_init=_small_normal, dtype=self.dtype, name=f"hidden{i}"
            )
            x = nn.relu(dense(x))
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return x.astype(jnp.float32)


def _register_cifar(depth: int) -> None:
    @register(f"vgg{depth}")
    def factory(
        *,
        num_classes: int,
        width_factor: float = 1.0,
        dtype: Any = jnp.float32,
        remat: Remat = False,
    ) -> VGG:
        return VGG(
            num_classes=checked_classes(num_classes),
            stage_sizes=SIZES[depth],
            stage_widths=scaled(WIDTHS, width_factor),
            dtype=checked_dtype(dtype),
            remat=remat,
        )


def _register_imagenet(depth: int) -> None:
    @register(f"vgg{depth}_imagenet")
    def factory(
        *,
        num_classes: int,
        width_factor: float = 1.0,
        dropout: float = 0.0,
        dtype: Any = jnp.float32,
        remat: Remat = False,
    ) -> VGG:
        return VGG(
            num_classes=checked_classes(num_classes),
            stage_sizes=SIZES[depth],
            stage_widths=scaled(WIDTHS, width_factor),
            hidden=scaled(HIDDEN, width_factor),
            dropout=checked_rate("dropout", dropout),
            dtype=checked_dtype(dtype),
            remat=remat,
        )


for _depth in SIZES:
    _register_cifar(_depth)
    if _depth > 8:
        _register_imagenet(_depth)
