"""BottleFit: residual networks cut in two, with few channels sent between the parts.

The stem and the first two stages of any residual network are replaced by an encoder,
which runs on a device, and a decoder (`jaxkd.layers.bottleneck`). Everything else keeps
the parameter names of the network itself, so that a teacher's parameters can be copied
by path; the new ones are below `trunk/bottleneck/encoder` and
`trunk/bottleneck/decoder`.

Taps of `bottlefit`: "bottleneck", the encoder's output before it is quantised;
"stage2", the decoder's output, in the shape of the network's own stage 2; then those of
the network, with "stageN_pre" from stage 3 on. `bottlefit_seg` is `resnet18_seg` with a
bottleneck: its taps are "bottleneck", then e3 (the decoder's output), e4, e5, d5, d4
and out.

The published network is ResNet-152, with 12 or fewer channels; 224 x 224 images then
need 29 * 29 * channels + 8 bytes at 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxkd.layers import Remat
from jaxkd.layers.bottleneck import Bits, BottleneckCodec, Version
from jaxkd.models.registry import create, register
from jaxkd.models.resnet import ResNet, ResNetTrunk, Stem
from jaxkd.models.resnet_segmentation import ResNetSegmenter


class BottleFit(ResNet):
    """A residual classifier behind a bottleneck (see the module docstring)."""

    def facts(self, input_shape: Sequence[int]) -> dict[str, int]:
        """What one image `(height, width, channels)` costs to send.

        Returns:
          "bytes_sent", of the code with its scale and zero point where it has them, and
          "bytes_input", of the image at one byte a channel.
        """
        return _facts(self.trunk, input_shape)


class BottleFitSegmenter(ResNetSegmenter):
    """The light segmentation student behind a bottleneck (see the module docstring)."""

    def facts(self, input_shape: Sequence[int]) -> dict[str, int]:
        """What one image costs to send, see `BottleFit.facts`."""
        return _facts(self.trunk, input_shape)


def _facts(trunk: ResNetTrunk, input_shape: Sequence[int]) -> dict[str, int]:
    if trunk.bottleneck is None:
        raise ValueError("the trunk has no bottleneck; make it with `create`")
    height, width, channels = input_shape
    return {
        "bytes_sent": trunk.bottleneck.bytes_sent((height, width)),
        "bytes_input": height * width * channels,
    }


def _with_bottleneck(trunk: ResNetTrunk, channels: int, **options: Any) -> ResNetTrunk:
    codec = BottleneckCodec(
        channels=channels,
        stem_width=trunk.stem_width,
        stage_width=trunk.stage_widths[1],
        small=trunk.stem == "cifar",
        dtype=trunk.dtype,
        remat=trunk.remat,
        **options,
    )
    return trunk.clone(bottleneck=codec)


@register()
def bottlefit(
    *,
    num_classes: int,
    base: str = "resnet152",
    bottleneck_channels: int = 12,
    version: Version = 2,
    bits: Bits | None = None,
    per_sample: bool = True,
    stem: Stem | None = None,
    width_factor: float = 1.0,
    dtype: Any = jnp.float32,
    remat: Remat = False,
) -> BottleFit:
    """A residual classifier with a bottleneck (Matsubara et al., 2022).

    Args:
      num_classes: number of logits.
      base: the network: any residual one of `jaxkd.models`, e.g. "resnet20".
      bottleneck_channels: channels that are sent.
      version: of the encoder and decoder, see `jaxkd.layers.bottleneck`.
      bits: what is sent, and so what evaluation computes with: None for float32, 16
        for float16, 8 for integers. Training never quantises.
      per_sample: whether, at 8 bits, every image has its own scale. The published code
        has one for the batch, which it evaluates one by one.
      stem: of the base; the base's own by default.
      width_factor: see `jaxkd.models.registry`.
      dtype: likewise.
      remat: likewise.

    Raises:
      ValueError: `base` is no residual network, or no channels.
    """
    network = create(
        base,
        num_classes=num_classes,
        width_factor=width_factor,
        dtype=dtype,
        remat=remat,
        **({} if stem is None else {"stem": stem}),
    )
    if not isinstance(network, ResNet) or network.trunk.bottleneck is not None:
        raise ValueError(
            f"base must be a residual network such as 'resnet50', got {base!r}"
        )
    trunk = _with_bottleneck(
        network.trunk,
        bottleneck_channels,
        version=version,
        bits=bits,
        per_sample=per_sample,
    )
    return BottleFit(num_classes=network.num_classes, trunk=trunk)


@register()
def bottlefit_seg(
    *,
    num_classes: int,
    bottleneck_channels: int = 12,
    version: Version = 2,
    bits: Bits | None = None,
    per_sample: bool = True,
    width_factor: float = 1.0,
    dtype: Any = jnp.float32,
    remat: Remat = False,
) -> BottleFitSegmenter:
    """`resnet18_seg` with a bottleneck; the options are those of `bottlefit`.

    Nothing is published for segmentation with this bottleneck: the taps e3 to e5 are
    those that a `resnet18_seg` teacher has too.
    """
    network = create(
        "resnet18_seg",
        num_classes=num_classes,
        width_factor=width_factor,
        dtype=dtype,
        remat=remat,
    )
    trunk = _with_bottleneck(
        network.trunk,
        bottleneck_channels,
        version=version,
        bits=bits,
        per_sample=per_sample,
    )
    return BottleFitSegmenter(num_classes=network.num_classes, trunk=trunk)
