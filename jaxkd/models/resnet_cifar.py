"""Residual networks for 32x32 images, as behind the published CIFAR-100 tables.

`resnetN` has three stages of (N - 2) / 6 basic blocks with widths 16, 32, 64;
`resnet8x4` and `resnet32x4` have widths 64, 128, 256 after a stem of 32; `wrn_d_k` are
wide residual networks of depth d and widths 16k, 32k, 64k after a stem of 16. Where
shapes change, shortcuts are 1x1 convolutions, so the numbers of parameters differ
from those of He et al. (2016), whose shortcuts have none. Any image size is accepted.

Taps for images of height H: stem H, stage1 H, stage2 H/2, stage3 H/4 (rounded up), and
pooled, `[batch, channels]`. In `resnet*` they follow the ReLU, and "stageN_pre" and the
options `skip` and `skip_blocks` are those of `jaxkd.models.resnet`; `plainN` is
`resnetN` without shortcuts.

In `wrn_*` the stages are the raw sums before the next batch norm, and stem is the raw
convolution. "stageN_pre" is what that next batch norm makes of stageN, before its ReLU:
the first norm of the next stage, or the last one of the network. This is the map that
methods on pre-activations compare (OFD), and `norms["stageN_pre"]` is that norm.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.layers import (
    BatchNorm,
    Outputs,
    PreActivationBlock,
    Remat,
    conv,
    maybe_remat,
)
from jaxkd.layers.blocks import Maps
from jaxkd.models._options import (
    check_images,
    checked_classes,
    checked_dtype,
    scaled,
)
from jaxkd.models.registry import register
from jaxkd.models.resnet import (
    ResNet,
    ResNetTrunk,
    Skip,
    checked_skip,
    classifier,
)


class WideResNet(nn.Module):
    """A wide residual network with pre-activated blocks, without dropout.

    Attributes:
      num_classes: number of logits.
      blocks_per_stage: (depth - 4) / 6.
      stage_widths: output channels of the three stages.
      stem_width: channels of the first convolution.
      dtype: dtype of the computation.
      remat: what the backward pass recomputes, see `jaxkd.layers.Remat`.

    Reference: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016.
    """

    num_classes: int
    blocks_per_stage: int
    stage_widths: Sequence[int]
    stem_width: int = 16
    dtype: Any = jnp.float32
    remat: Remat = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool = False
    ) -> Outputs:
        """Classifies images `[b, h, w, c]` into logits `[b, classes]`."""
        check_images(images, network="wide resnet")
        block = maybe_remat(PreActivationBlock, self.remat)
        x = images.astype(self.dtype)
        x = conv(self.stem_width, dtype=self.dtype, name="stem")(x)
        taps, norms = collections.OrderedDict(stem=x), collections.OrderedDict()

        def add_stage(stage: int, sums: Maps, pre: Maps, norm: Any) -> None:
            taps[f"stage{stage}_pre"], taps[f"stage{stage}"] = pre, sums
            norms[f"stage{stage}_pre"] = norm

        for stage, width in enumerate(self.stage_widths, start=1):
            for i in range(self.blocks_per_stage):
                stride = 2 if stage > 1 and i == 0 else 1
                name = f"stage{stage}_block{i + 1}"
                sums = x
                x, pre = block(
                    width, stride=stride, dtype=self.dtype, with_pre=True, name=name
                )(x, train)
                if stage > 1 and i == 0:
                    norm = self.get_variable("params", name)["norm1"]
                    add_stage(stage - 1, sums, pre, norm)
        pre = BatchNorm(dtype=self.dtype, name="norm")(x, train)
        norm = self.get_variable("params", "norm")
        add_stage(len(self.stage_widths), x, pre, norm)
        taps["pooled"] = jnp.mean(nn.relu(pre), axis=(1, 2), dtype=jnp.float32)
        logits = classifier(taps["pooled"], self.num_classes, nn.initializers.zeros)
        head = self.get_variable("params", "head")
        return Outputs(logits=logits, taps=taps, head=head, norms=norms)


def _register_resnet(name: str, depth: int, widths: tuple[int, ...]) -> None:
    stage_sizes = ((depth - 2) // 6,) * 3

    @register(name)
    def factory(
        *,
        num_classes: int,
        width_factor: float = 1.0,
        skip: Skip = "all",
        skip_blocks: int | None = None,
        dtype: Any = jnp.float32,
        remat: Remat = False,
    ) -> ResNet:
        stem_width, *stage_widths = scaled(widths, width_factor)
        trunk = ResNetTrunk(
            stage_sizes=stage_sizes,
            stage_widths=tuple(stage_widths),
            stem_width=stem_width,
            stem="cifar",
            dtype=checked_dtype(dtype),
            remat=remat,
            **checked_skip(skip, skip_blocks, stage_sizes),
        )
        return ResNet(num_classes=checked_classes(num_classes), trunk=trunk)

    if name not in ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110"):
        return

    @register(f"plain{depth}")
    def plain(
        *,
        num_classes: int,
        width_factor: float = 1.0,
        dtype: Any = jnp.float32,
        remat: Remat = False,
    ) -> ResNet:
        return factory(
            num_classes=num_classes,
            width_factor=width_factor,
            skip="none",
            dtype=dtype,
            remat=remat,
        )


def _register_wide_resnet(depth: int, widening: int) -> None:
    @register(f"wrn_{depth}_{widening}")
    def factory(
        *,
        num_classes: int,
        width_factor: float = 1.0,
        dtype: Any = jnp.float32,
        remat: Remat = False,
    ) -> WideResNet:
        widths = (16, 16 * widening, 32 * widening, 64 * widening)
        stem_width, *stage_widths = scaled(widths, width_factor)
        return WideResNet(
            num_classes=checked_classes(num_classes),
            blocks_per_stage=(depth - 4) // 6,
            stage_widths=tuple(stage_widths),
            stem_width=stem_width,
            dtype=checked_dtype(dtype),
            remat=remat,
        )


for _depth in (8, 14, 20, 32, 44, 56, 110):
    _register_resnet(f"resnet{_depth}", _depth, (16, 16, 32, 64))
for _depth in (8, 32):
    _register_resnet(f"resnet{_depth}x4", _depth, (32, 64, 128, 256))
for _depth, _widenings in ((16, (1, 2, 4)), (28, (2, 4, 10)), (40, (1, 2, 4))):
    for _widening in _widenings:
        _register_wide_resnet(_depth, _widening)
