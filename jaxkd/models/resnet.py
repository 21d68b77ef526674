"""Residual networks for images: ResNet-18, 34, 50, 101, and the trunk all share.

The topology is torchvision's (a Bottleneck's stride is in its 3x3 convolution).
`stem="imagenet"` is a 7x7 convolution of stride 2 and a 3x3 max-pool of stride 2;
`stem="cifar"` a 3x3 convolution of stride 1 and no pool, for small images. Any image
size is accepted; a stage of stride 2 rounds up.

Taps, after the ReLU, for images of height H (imagenet | cifar stem), width factor 1:

    stem H/2 64 (before the pool)        | H 64
    stage1 H/4, stage2 H/8, stage3 H/16, stage4 H/32
                                         | H, H/2, H/4, H/8
      channels 64, 128, 256, 512 (ResNet-18, 34); 256, 512, 1024, 2048 (50, 101)
    pooled, the mean of stage4, `[batch, channels]`
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
    Outputs,
    bias_uniform,
    conv,
    fan_in_uniform,
    max_pool,
)
from jaxkd.models._options import (
    check_images,
    checked_classes,
    checked_dtype,
    maybe_remat,
    scaled,
)
from jaxkd.models.registry import register

Stem = Literal["imagenet", "cifar"]
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
      remat: whether to recompute each block's activations in the backward pass.
    """

    stage_sizes: Sequence[int]
    stage_widths: Sequence[int]
    stem_width: int
    stem: Stem = "imagenet"
    block: type[nn.Module] = BasicBlock
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool
    ) -> dict[str, jax.Array]:
        """Returns the maps "stem", "stage1", ... in depth order."""
        x = images.astype(self.dtype)
        large = self.stem == "imagenet"
        x = conv(
            self.stem_width,
            kernel_size=7 if large else 3,
            stride=2 if large else 1,
            dtype=self.dtype,
            name="stem",
        )(x)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="stem_norm")(x, train))
        maps = collections.OrderedDict(stem=x)
        if large:
            x = max_pool(x, window=3, stride=2, padding=1)
        block = maybe_remat(self.block, self.remat)
        sizes = zip(self.stage_sizes, self.stage_widths, strict=True)
        for stage, (size, width) in enumerate(sizes, start=1):
            for i in range(size):
                stride = 2 if stage > 1 and i == 0 else 1
                name = f"stage{stage}_block{i + 1}"
                x = block(width, stride=stride, dtype=self.dtype, name=name)(x, train)
            maps[f"stage{stage}"] = x
        return maps


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
        taps = self.trunk(images, train)
        x = next(reversed(taps.values()))
        taps["pooled"] = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return Outputs(logits=classifier(taps["pooled"], self.num_classes), taps=taps)


def classifier(
    x: Float[Array, "b c"],
    num_classes: int,
    bias_init: nn.initializers.Initializer | None = None,
) -> Float[Array, "b k"]:
    """The last linear layer of a classifier, in float32.

    To be called inside a compact module; its parameters are named "head".
    """
    dense = nn.Dense(
        num_classes,
        kernel_init=fan_in_uniform,
        bias_init=bias_init or bias_uniform(x.shape[-1]),
        name="head",
    )
    return dense(x)


def _register_imagenet(
    name: str, stage_sizes: tuple[int, ...], block: type[nn.Module], expansion: int
) -> None:
    @register(name)
    def factory(
        *,
        num_classes: int,
        width_factor: float = 1.0,
        stem: Stem = "imagenet",
        dtype: Any = jnp.float32,
        remat: bool = False,
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
        )
        return ResNet(num_classes=checked_classes(num_classes), trunk=trunk)


_register_imagenet("resnet18", (2, 2, 2, 2), BasicBlock, 1)
_register_imagenet("resnet34", (3, 4, 6, 3), BasicBlock, 1)
_register_imagenet("resnet50", (3, 4, 6, 3), Bottleneck, 4)
_register_imagenet("resnet101", (3, 4, 23, 3), Bottleneck, 4)
