"""The CIFAR residual networks of the benchmark, written in PyTorch.

The same networks as `jaxkd.models` builds under the same names: three stages of basic
blocks, batch norm, 1x1-convolution shortcuts where the shape changes. The last ReLU of
a block is part of the block.
"""

import torch
from torch import nn

# Channels of the stem and of the three stages.
NARROW = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)
# Name: (depth, channels); depth = 6 n + 2 with n blocks in each stage.
NETWORKS = {
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

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, three stages of `(depth - 2) / 6` blocks, mean over pixels, classifier."""

    def __init__(self, depth: int, channels: tuple[int, ...], num_classes: int):
        super().__init__()
        stem, *stages = channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, 1, 1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
        )
        blocks, channels_in = [], stem
        for stage, width in enumerate(stages):
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Block(channels_in, width, stride))
                channels_in = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="relu"
                )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        return self.classifier(x.mean(dim=(2, 3)))


def create(name: str, *, num_classes: int) -> ResNet:
    """The network called `name`, one of `NETWORKS`."""
    depth, channels = NETWORKS[name]
    return ResNet(depth, channels, num_classes)


def count_parameters(network: nn.Module) -> int:
    """The number of trained values."""
    return sum(p.numel() for p in network.parameters())
