"""Residual networks for images: ResNet-18 to 152, and the trunk all of them share.

The topology is torchvision's (a Bottleneck's stride is in its 3x3 convolution).
`stem="imagenet"` is a 7x7 convolution of stride 2 and a 3x3 max-pool of stride 2;
`stem="cifar"` a 3x3 convolution of stride 1 and no pool, for small images. Any image
size is accepted; a stage of stride 2 rounds up.

Taps, after the ReLU, for images of height H (imagenet | cifar stem), width factor 1:

    stem H/2 64 (before the pool)        | H 64
    stage1 H/4, stage2 H/8, stage3 H/16, stage4 H/32
                                         | H, H/2, H/4, H/8
      channels 64, 128, 256, 512 (ResNet-18, 34); 256, 512, 1024, 2048 (50 and more)
    pooled, the mean of stage4, `[batch, channels]`

"stageN_pre" is stageN before its ReLU; `norms["stageN_pre"]` is the last batch norm of
the stage's last block (before the shortcut is added).

`skip` says which blocks have a shortcut: "all" of them, "none" (the `plainN` networks),
"downsample_only" (those whose shape changes, where the shortcut is a 1x1 convolution),
or "first_k" (the first `skip_blocks` blocks). A block without one is `relu(F(x))`, has
no 1x1 convolution, and its other parameters are drawn as if it had.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.layers import (
    BasicBlock,
    BatchNorm,
    Bottleneck,
    BottleneckCodec,
    Outputs,
    Remat,
    bias_uniform,
    conv,
    fan_in_uniform,
    max_pool,
    maybe_remat,
)
from jaxkd.layers.dense import Dense
from jaxkd.models._options import (
    check_images,
    checked_classes,
    checked_dtype,
    scaled,
)
from jaxkd.models.registry import register

Stem = Literal["imagenet", "cifar"]
Skip = Literal["all", "none", "downsample_only", "first_k"]
Block = type[BasicBlock] | type[Bottleneck]
WIDTHS = (64, 128, 256, 512)


class ResNetTrunk(nn.Module):
    """The stem and stages of a residual network, without pooling and classifier.

    Attributes:
      stage_sizes: blocks per stage.
      stage_widths: output channels per stage; stages after the first halve the map.
      stem_width: channels of the stem.
      stem: see the module docstring.
      block: `BasicBlock` or `Bottleneck`.
      dtype: dtype of the computation.
      remat: what the backward pass recomputes, see `jaxkd.layers.Remat`.
      skip: which blocks have a shortcut, see the module docstring.
      skip_blocks: the number of them for "first_k".
      bottleneck: stands for the stem and the first two stages if given; see
        `jaxkd.models.bottlefit`.
    """

    stage_sizes: Sequence[int]
    stage_widths: Sequence[int]
    stem_width: int
    stem: Stem = "imagenet"
    block: Block = BasicBlock
    dtype: Any = jnp.float32
    remat: Remat = False
    skip: Skip = "all"
    skip_blocks: int = 0
    bottleneck: BottleneckCodec | None = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Returns the maps "stem", "stage1_pre", "stage1", ... and their norms."""
        maps, norms = collections.OrderedDict(), collections.OrderedDict()
        if self.bottleneck is None:
            maps["stem"], x = self._stem(images, train)
            done = 0
        else:
            maps["bottleneck"], x = self.bottleneck(images, train)
            maps["stage2"] = x
            done = 2
        block = maybe_remat(self.block, self.remat)
        index = sum(self.stage_sizes[:done])
        for stage in range(done + 1, len(self.stage_sizes) + 1):
            width, name, pre = self.stage_widths[stage - 1], "", x
            for i in range(self.stage_sizes[stage - 1]):
                stride = 2 if stage > 1 and i == 0 else 1
                name = f"stage{stage}_block{i + 1}"
                x, pre = block(
                    width,
                    stride=stride,
                    dtype=self.dtype,
                    skip=self._skips(index, stride, x.shape[-1] != width),
                    with_pre=True,
                    name=name,
                )(x, train)
                index += 1
            maps[f"stage{stage}_pre"], maps[f"stage{stage}"] = pre, x
            last_block = self.get_variable("params", name)
            norms[f"stage{stage}_pre"] = last_block[self.block.last_norm]
        return maps, norms

    def _stem(
        self, images: Float[Array, "b h w c"], train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """The map "stem" and what the first stage sees of it."""
        large = self.stem == "imagenet"
        x = conv(
            self.stem_width,
            kernel_size=7 if large else 3,
            stride=2 if large else 1,
            dtype=self.dtype,
            name="stem",
        )(images.astype(self.dtype))
        x = nn.relu(BatchNorm(dtype=self.dtype, name="stem_norm")(x, train))
        return x, max_pool(x, window=3, stride=2, padding=1) if large else x

    def _skips(self, index: int, stride: int, widens: bool) -> bool:
        """Whether block number `index`, counted from 0, has a shortcut."""
        return {
            "all": True,
            "none": False,
            "downsample_only": stride > 1 or widens,
            "first_k": index < self.skip_blocks,
        }[self.skip]


class ResNet(nn.Module):
    """A residual trunk, global average pooling and a linear classifier.

    Attributes:
      num_classes: number of logits.
      trunk: the convolutional part.

    Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    num_classes: int
    trunk: ResNetTrunk

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool = False
    ) -> Outputs:
        """Classifies images `[b, h, w, c]` into logits `[b, classes]`."""
        check_images(images, network="resnet")
        taps, norms = self.trunk(images, train)
        x = next(reversed(taps.values()))
        taps["pooled"] = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        logits = classifier(taps["pooled"], self.num_classes)
        head = self.get_variable("params", "head")
        return Outputs(logits=logits, taps=taps, head=head, norms=norms)


def classifier(
    x: Float[Array, "b c"],
    num_classes: int,
    bias_init: nn.initializers.Initializer | None = None,
) -> Float[Array, "b k"]:
    """The last linear layer of a classifier, in float32.

    To be called inside a compact module; its parameters are named "head".
    """
    dense = Dense(
        num_classes,
        kernel_init=fan_in_uniform,
        bias_init=bias_init or bias_uniform(x.shape[-1]),
        name="head",
    )
    return dense(x)


def checked_skip(
    skip: Skip, skip_blocks: int | None, stage_sizes: Sequence[int]
) -> dict[str, Any]:
    """The trunk's options for `skip` and `skip_blocks`.

    Raises:
      ValueError: "first_k" without a number from 0 to that of all blocks, or a number
        without "first_k".
    """
    if skip != "first_k" and skip_blocks is not None:
        raise ValueError(f'skip_blocks needs skip="first_k", got skip={skip!r}')
    total = sum(stage_sizes)
    if skip == "first_k" and (skip_blocks is None or not 0 <= skip_blocks <= total):
        raise ValueError(
            f'skip="first_k" needs skip_blocks from 0 to {total}, got {skip_blocks}'
        )
    return {"skip": skip, "skip_blocks": skip_blocks or 0}


def _register_imagenet(
    depth: int,
    stage_sizes: tuple[int, ...],
    block: Block = Bottleneck,
    expansion: int = 4,
) -> None:
    @register(f"resnet{depth}")
    def factory(
        *,
        num_classes: int,
        width_factor: float = 1.0,
        stem: Stem = "imagenet",
        skip: Skip = "all",
        skip_blocks: int | None = None,
        dtype: Any = jnp.float32,
        remat: Remat = False,
    ) -> ResNet:
        widths = scaled(WIDTHS, width_factor)
        trunk = ResNetTrunk(
            stage_sizes=stage_sizes,
            stage_widths=tuple(expansion * width for width in widths),
            stem_width=widths[0],
            stem=stem,
            block=block,
            dtype=checked_dtype(dtype),
            remat=remat,
            **checked_skip(skip, skip_blocks, stage_sizes),
        )
        return ResNet(num_classes=checked_classes(num_classes), trunk=trunk)

    if depth > 50:
        return

    @register(f"plain{depth}")
    def plain(
        *,
        num_classes: int,
        width_factor: float = 1.0,
        stem: Stem = "imagenet",
        dtype: Any = jnp.float32,
        remat: Remat = False,
    ) -> ResNet:
        return factory(
            num_classes=num_classes,
            width_factor=width_factor,
            stem=stem,
            skip="none",
            dtype=dtype,
            remat=remat,
        )


_register_imagenet(18, (2, 2, 2, 2), BasicBlock, 1)
_register_imagenet(34, (3, 4, 6, 3), BasicBlock, 1)
_register_imagenet(50, (3, 4, 6, 3))
_register_imagenet(101, (3, 4, 23, 3))
_register_imagenet(152, (3, 8, 36, 3))
