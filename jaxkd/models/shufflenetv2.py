"""ShuffleNetV2 at four widths, for ImageNet and for 32x32 images.

`shufflenetv2_x0_5`, `_x1_0`, `_x1_5` and `_x2_0` are torchvision's for
`stem="imagenet"`: a 3x3 convolution of stride 2 and a 3x3 max-pool of stride 2. With
`stem="cifar"`, a 1x1 convolution of stride 1 and no pool, they are those behind the
published CIFAR-100 tables, where "ShuffleV2" is x1_0 (their x2.0, unlike ours,
has 224 channels in stage1). Any image size is accepted. With a `width_factor`, stage
widths are rounded to even numbers.

Taps for images of height H (rounded up), imagenet | cifar:

    stem    H/2 24 (before the pool)       | H   24
    stage1  H/8, stage2 H/16, stage3 H/32  | H/2, H/4, H/8
      channels x0.5 48, 96, 192; x1 116, 232, 464; x1.5 176, 352, 704;
      x2 244, 488, 976
    pooled, the mean of the last 1x1 convolution's 1024 channels (2048 for x2)

All follow the ReLU and the shuffle of channels; `stage{i}_pre` is stage i before the
last block's last ReLU, shuffled alike, so that its ReLU is stage i. Only half of its
channels come from a batch norm (the others pass by): there are no `norms`.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.layers import Outputs, Remat, fan_in_uniform, max_pool, maybe_remat
from jaxkd.models._options import (
    check_images,
    checked_classes,
    checked_dtype,
    scaled,
)
from jaxkd.models._units import ConvNorm, channel_shuffle
from jaxkd.models.registry import register
from jaxkd.models.resnet import Stem, classifier

SIZES = (4, 8, 4)
# Widths of the three stages and of the last convolution.
WIDTHS = {
    "x0_5": (48, 96, 192, 1024),
    "x1_0": (116, 232, 464, 1024),
    "x1_5": (176, 352, 704, 1024),
    "x2_0": (244, 488, 976, 2048),
}


class SplitBlock(nn.Module):
    """Two branches of half the channels each, concatenated and shuffled.

    The branch of a 1x1, a depthwise 3x3 and a 1x1 convolution sees the second half of
    the input, and the first half passes by. At stride 2 both branches see the whole
    input, and the other one is a depthwise 3x3 and a 1x1 convolution.

    Attributes:
      features: output channels, an even number.
      stride: stride of the depthwise convolutions.
      dtype: dtype of the computation.

    Reference: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN
    Architecture Design", ECCV 2018.
    """

    features: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool
    ) -> Float[Array, "b new_h new_w new_c"]:
        """Maps `[b, h, w, c]` to `[b, ceil(h/stride), ceil(w/stride), features]`.

        The result lacks the block's last ReLU.
        """
        unit = functools.partial(ConvNorm, kernel_init=fan_in_uniform, dtype=self.dtype)
        stride, half = self.stride, self.features // 2
        if stride == 1:
            passed, y = jnp.split(x, 2, axis=-1)
        else:
            channels = x.shape[-1]
            side = unit(channels, stride=stride, groups=channels, name="side_depthwise")
            passed = side(x, train)
            passed = unit(half, kernel_size=1, name="side_expand")(passed, train)
            y = x
        y = nn.relu(unit(half, kernel_size=1, name="squeeze")(y, train))
        y = unit(half, stride=stride, groups=half, name="depthwise")(y, train)
        y = unit(half, kernel_size=1, name="expand")(y, train)
        return channel_shuffle(jnp.concatenate([passed, y], axis=-1), 2)


class ShuffleNetV2(nn.Module):
    """A stem, three stages of split blocks, a 1x1 convolution, a linear classifier.

    Attributes:
      num_classes: number of logits.
      stem_width: channels of the first convolution.
      stage_widths: output channels per stage, even numbers.
      last_width: channels of the last convolution.
      stage_sizes: blocks per stage.
      stem: see the module docstring.
      dtype: dtype of the computation.
      remat: what the backward pass recomputes, see `jaxkd.layers.Remat`.

    Reference: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN
    Architecture Design", ECCV 2018.
    """

    num_classes: int
    stem_width: int
    stage_widths: Sequence[int]
    last_width: int
    stage_sizes: Sequence[int] = SIZES
    stem: Stem = "imagenet"
    dtype: Any = jnp.float32
    remat: Remat = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool = False
    ) -> Outputs:
        """Classifies images `[b, h, w, c]` into logits `[b, classes]`."""
        check_images(images, network="shufflenetv2")
        block = maybe_remat(SplitBlock, self.remat)
        unit = functools.partial(ConvNorm, kernel_init=fan_in_uniform, dtype=self.dtype)
        large = self.stem == "imagenet"
        stem = unit(
            self.stem_width,
            kernel_size=3 if large else 1,
            stride=2 if large else 1,
            name="stem_unit",
        )
        x = nn.relu(stem(images.astype(self.dtype), train))
        taps: dict[str, jax.Array] = collections.OrderedDict(stem=x)
        if large:
            x = max_pool(x, window=3, stride=2, padding=1)
        stages = zip(self.stage_sizes, self.stage_widths, strict=True)
        for stage, (size, width) in enumerate(stages, start=1):
            tap, pre = f"stage{stage}", x
            for i in range(size):
                pre = block(
                    width,
                    stride=1 if i else 2,
                    dtype=self.dtype,
                    name=f"{tap}_block{i + 1}",
                )(x, train)
                # The half that passed by has no negative number: it keeps its values.
                x = nn.relu(pre)
            taps[f"{tap}_pre"], taps[tap] = pre, x
        x = nn.relu(unit(self.last_width, kernel_size=1, name="last")(x, train))
        taps["pooled"] = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        logits = classifier(taps["pooled"], self.num_classes)
        head = self.get_variable("params", "head")
        return Outputs(logits=logits, taps=taps, head=head)


def _register(size: str) -> None:
    @register(f"shufflenetv2_{size}")
    def factory(
        *,
        num_classes: int,
        width_factor: float = 1.0,
        stem: Stem = "imagenet",
        dtype: Any = jnp.float32,
        remat: Remat = False,
    ) -> ShuffleNetV2:
        *widths, last_width = WIDTHS[size]
        halves = scaled([width // 2 for width in widths], width_factor)
        stem_width, last_width = scaled((24, last_width), width_factor)
        return ShuffleNetV2(
            num_classes=checked_classes(num_classes),
            stem_width=stem_width,
            stage_widths=tuple(2 * half for half in halves),
            last_width=last_width,
            stem=stem,
            dtype=checked_dtype(dtype),
            remat=remat,
        )


for _size in WIDTHS:
    _register(_size)
