"""The light segmentation student of HLFD: a ResNet-18 trunk without a decoder.

A single input channel is repeated to three. The logits are a 1x1 convolution of the
last stage, resized bilinearly (aligned corners) to the image; 11,177,538 parameters for
two classes. Its "decoder" taps are its own encoder maps resized to the image's size in
the same way. Any image size is accepted; multiples of 32 are resized by whole factors.

Taps at width factor 1 for images of height H (width alike):

    e1 stem H/2 64 | e2 stage1 H/4 64 | e3 stage2 H/8 128 | e4 stage3 H/16 256
    e5 stage4 H/32 512 | d5 e4 at H 256 | d4 e3 at H 128 | d3 e2 at H 64
    d2 e1 at H 64 | out H classes (the logits)
"""

from __future__ import annotations

import collections
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.layers import BasicBlock, Outputs, Remat
from jaxkd.models._options import check_images, checked_classes, checked_dtype, scaled
from jaxkd.models.registry import register
from jaxkd.models.resnet import WIDTHS, ResNetTrunk
from jaxkd.models.unet import head
from jaxkd.numerics import resize_bilinear

_NAMES = {"stem": "e1", "stage1": "e2", "stage2": "e3", "stage3": "e4", "stage4": "e5"}


class ResNetSegmenter(nn.Module):
    """A residual trunk of four stages and a 1x1 convolution (module docstring).

    Attributes:
      num_classes: channels of the logits.
      trunk: the convolutional part, with an "imagenet" stem.
    """

    num_classes: int
    trunk: ResNetTrunk

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool = False
    ) -> Outputs:
        """Segments images `[b, h, w, c]` into logits `[b, h, w, classes]`."""
        check_images(images, network="resnet18_seg")
        size = images.shape[1:3]
        if images.shape[-1] == 1:
            images = jnp.repeat(images, 3, axis=-1)
        maps, _ = self.trunk(images, train)
        taps = collections.OrderedDict(
            (_NAMES.get(name, name), x)
            for name, x in maps.items()
            if not name.endswith("_pre")
        )
        for i in (4, 3, 2, 1):
            if f"e{i}" in taps:
                taps[f"d{i + 1}"] = resize_bilinear(
                    taps[f"e{i}"], size, align_corners=True
                )
        logits = head(taps["e5"], self.num_classes)
        taps["out"] = resize_bilinear(logits, size, align_corners=True)
        return Outputs(logits=taps["out"], taps=taps)


@register()
def resnet18_seg(
    *,
    num_classes: int,
    width_factor: float = 1.0,
    dtype: Any = jnp.float32,
    remat: Remat = False,
) -> ResNetSegmenter:
    """The student of HLFD's code; options as in `jaxkd.models.registry`."""
    widths = scaled(WIDTHS, width_factor)
    trunk = ResNetTrunk(
        stage_sizes=(2, 2, 2, 2),
        stage_widths=widths,
        stem_width=widths[0],
        block=BasicBlock,
        dtype=checked_dtype(dtype),
        remat=remat,
    )
    return ResNetSegmenter(num_classes=checked_classes(num_classes), trunk=trunk)
