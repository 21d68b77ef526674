"""ShuffleNet for 32x32 images, as behind the published CIFAR-100 tables.

Three groups; three stages of 4, 8, 4 blocks with widths 240, 480, 960 after a 1x1
convolution of 24 channels. The first block of a stage halves the map and concatenates
its shortcut, a 3x3 mean. As published for CIFAR, such a block's inner width is a
quarter of what it adds, not of the stage's width. Any image size is accepted; with a
`width_factor`, widths are rounded to multiples of 12 and double from stage to stage.

Taps at width factor 1 for images of height H (rounded up):

    stem H 24 | stage1 H/2 240 | stage2 H/4 480 | stage3 H/8 960
    pooled, the mean of stage3, `[batch, channels]`

All follow the ReLU; `stage{i}_pre` is stage i before it, `norms["stage{i}_pre"]` the
last batch norm of the stage's last block, to whose output the shortcut is added.
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

from jaxkd.layers import Outputs, Remat, fan_in_uniform, maybe_remat
from jaxkd.models._options import (
    check_images,
    checked_classes,
    checked_dtype,
    checked_factor,
)
from jaxkd.models._units import ConvNorm, channel_shuffle
from jaxkd.models.registry import register
from jaxkd.models.resnet import classifier

GROUPS = 3


class ShuffleBlock(nn.Module):
    """Grouped 1x1, depthwise 3x3 and grouped 1x1 convolutions beside a shortcut.

    At stride 1 the input is added; at stride 2 its 3x3 mean is concatenated.

    Attributes:
      features: output channels, at stride 2 including those of the input.
      stride: stride of the depthwise convolution and of the shortcut.
      groups: groups of the last convolution.
      groups_in: groups of the first convolution, whose channels are then shuffled.
      dtype: dtype of the computation.

    Reference: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural
    Network for Mobile Devices", CVPR 2018.
    """

    features: int
    stride: int
    groups: int
    groups_in: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool
    ) -> Float[Array, "b new_h new_w new_c"]:
        """Maps `[b, h, w, c]` to `[b, ceil(h/stride), ceil(w/stride), features]`.

        The result lacks the block's last ReLU.
        """
        unit = functools.partial(ConvNorm, kernel_init=fan_in_uniform, dtype=self.dtype)
        added = self.features - (x.shape[-1] if self.stride == 2 else 0)
        inner = added // 4
        squeeze = unit(inner, kernel_size=1, groups=self.groups_in, name="squeeze")
        y = channel_shuffle(nn.relu(squeeze(x, train)), self.groups_in)
        depthwise = unit(inner, stride=self.stride, groups=inner, name="depthwise")
        y = nn.relu(depthwise(y, train))
        y = unit(added, kernel_size=1, groups=self.groups, name="expand")(y, train)
        if self.stride == 1:
            return x + y
        edges: Any = ((1, 1), (1, 1))
        x = nn.avg_pool(x, (3, 3), strides=(2, 2), padding=edges)
        return jnp.concatenate([y, x], axis=-1)


class ShuffleNetV1(nn.Module):
    """A 1x1 convolution, three stages of shuffle blocks and a linear classifier.

    Attributes:
      num_classes: number of logits.
      stem_width: channels of the first convolution.
      stage_widths: output channels per stage.
      stage_sizes: blocks per stage.
      groups: groups of the 1x1 convolutions; the very first block's input has one.
      dtype: dtype of the computation.
      remat: what the backward pass recomputes, see `jaxkd.layers.Remat`.

    Reference: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural
    Network for Mobile Devices", CVPR 2018.
    """

    num_classes: int
    stem_width: int
    stage_widths: Sequence[int]
    stage_sizes: Sequence[int] = (4, 8, 4)
    groups: int = GROUPS
    dtype: Any = jnp.float32
    remat: Remat = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool = False
    ) -> Outputs:
        """Classifies images `[b, h, w, c]` into logits `[b, classes]`."""
        check_images(images, network="shufflenetv1")
        block = maybe_remat(ShuffleBlock, self.remat)
        stem = ConvNorm(
            self.stem_width,
            kernel_size=1,
            kernel_init=fan_in_uniform,
            dtype=self.dtype,
            name="stem",
        )
        x = nn.relu(stem(images.astype(self.dtype), train))
        taps: dict[str, jax.Array] = collections.OrderedDict(stem=x)
        norms = {}
        stages = zip(self.stage_sizes, self.stage_widths, strict=True)
        for stage, (size, width) in enumerate(stages, start=1):
            tap, pre = f"stage{stage}", x
            for i in range(size):
                first = stage == 1 and i == 0
                pre = block(
                    width,
                    stride=1 if i else 2,
                    groups=self.groups,
                    groups_in=1 if first else self.groups,
                    dtype=self.dtype,
                    name=f"{tap}_block{i + 1}",
                )(x, train)
                x = nn.relu(pre)
            taps[f"{tap}_pre"], taps[tap] = pre, x
            parameters = self.get_variable("params", f"{tap}_block{size}")
            norms[f"{tap}_pre"] = parameters["expand"]["norm"]
        taps["pooled"] = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        logits = classifier(taps["pooled"], self.num_classes)
        head = self.get_variable("params", "head")
        return Outputs(logits=logits, taps=taps, head=head, norms=norms)


@register()
def shufflenetv1(
    *,
    num_classes: int,
    width_factor: float = 1.0,
    dtype: Any = jnp.float32,
    remat: Remat = False,
) -> ShuffleNetV1:
    """ShuffleNet of three groups for 32x32 images."""
    factor = checked_factor(width_factor)
    # Each group of each 1x1 convolution needs a whole number of inner channels, and
    # the first stage more channels than the stem.
    unit = 4 * GROUPS
    first = unit * max(2, round(240 / unit * factor))
    return ShuffleNetV1(
        num_classes=checked_classes(num_classes),
        stem_width=unit * max(1, round(24 / unit * factor)),
        stage_widths=(first, 2 * first, 4 * first),
        dtype=checked_dtype(dtype),
        remat=remat,
    )
