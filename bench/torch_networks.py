"""The residual networks of the benchmark, written in PyTorch.

The same networks as `jaxkd.models` builds under the same names: for CIFAR a 3x3 stem
and three stages of basic blocks; for ImageNet a 7x7 stem of stride 2 with a max-pool,
and four stages of basic blocks or bottlenecks, whose stride is in the 3x3 convolution.
Batch norm, and 1x1-convolution shortcuts where the shape changes. The last ReLU of a
block is part of the block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

# Channels of the stem and of the three stages of the CIFAR networks.
NARROW = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)
# Name: (depth, channels); depth = 6 n + 2 with n blocks in each stage.
CIFAR = {
    "resnet8": (8, NARROW),
    "resnet14": (14, NARROW),
    "resnet20": (20, NARROW),
    "resnet32": (32, NARROW),
    "resnet44": (44, NARROW),
    "resnet56": (56, NARROW),
    "resnet110": (110, NARROW),
    "resnet8x4": (8, WIDE),
    "resnet32x4": (32, WIDE),
}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = shortcut(channels_in, channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, the last to four times the width; a shortcut."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        width = channels // self.expansion
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = shortcut(channels_in, channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return self.relu(y + self.shortcut(x))


# Name: (block, blocks in each stage).
IMAGENET = {
    "resnet18": (Block, (2, 2, 2, 2)),
    "resnet34": (Block, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


def shortcut(channels_in: int, channels: int, stride: int) -> nn.Module:
    """The identity, or a 1x1 convolution where the shape changes."""
    if stride == 1 and channels_in == channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 1, stride, bias=False),
        nn.BatchNorm2d(channels),
    )


class ResNet(nn.Module):
    """Stem, stages, mean over pixels, classifier.

    Args:
      block: of the stages.
      sizes: blocks in each stage; stages after the first halve the map.
      stem: channels of the stem.
      channels: channels of each stage.
      large: whether the stem is that for large images.
      num_classes: number of logits.
    """

    def __init__(
        self,
        block: type[Block] | type[Bottleneck],
        sizes: Sequence[int],
        *,
        stem: int,
        channels: Sequence[int],
        large: bool,
        num_classes: int,
    ):
        super().__init__()
        size, stride = (7, 2) if large else (3, 1)
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, size, stride, size // 2, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
        )
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        blocks, channels_in = [], stem
        for stage, (count, width) in enumerate(zip(sizes, channels, strict=True)):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels_in, width, stride))
                channels_in = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="relu"
                )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.pool(self.stem(x)))
        return self.classifier(x.mean(dim=(2, 3)))


def names() -> tuple[str, ...]:
    """The networks that `create` knows."""
    return (*CIFAR, *IMAGENET)


def create(name: str, *, num_classes: int) -> ResNet:
    """The network called `name`, one of `names()`."""
    if name in CIFAR:
        depth, (stem, *channels) = CIFAR[name]
        sizes = ((depth - 2) // 6,) * 3
        return ResNet(
            Block,
            sizes,
            stem=stem,
            channels=channels,
            large=False,
            num_classes=num_classes,
        )
    block, sizes = IMAGENET[name]
    channels = [block.expansion * width for width in (64, 128, 256, 512)]
    return ResNet(
        block, sizes, stem=64, channels=channels, large=True, num_classes=num_classes
    )


def count_parameters(network: nn.Module) -> int:
    """The number of trained values."""
    return sum(p.numel() for p in network.parameters())
