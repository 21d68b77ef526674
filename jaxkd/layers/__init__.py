"""Reusable building blocks of networks, and the type every network returns."""

from jaxkd.layers.blocks import (
    BasicBlock,
    Bottleneck,
    ConvNormRelu,
    DoubleConv,
    PreActivationBlock,
    biased_conv,
    conv,
)
from jaxkd.layers.bottleneck import BottleneckCodec
from jaxkd.layers.initializers import bias_uniform, fan_in_uniform, kaiming_normal
from jaxkd.layers.norm import BatchNorm, LayerNorm
from jaxkd.layers.outputs import NetworkSpec, Outputs
from jaxkd.layers.partition import Partition
from jaxkd.layers.pooling import max_pool
from jaxkd.layers.remat import Remat, maybe_remat

__all__ = [
    "BasicBlock",
    "BatchNorm",
    "Bottleneck",
    "BottleneckCodec",
    "ConvNormRelu",
    "DoubleConv",
    "LayerNorm",
    "NetworkSpec",
    "Outputs",
    "Partition",
    "PreActivationBlock",
    "Remat",
    "bias_uniform",
    "biased_conv",
    "conv",
    "fan_in_uniform",
    "kaiming_normal",
    "max_pool",
    "maybe_remat",
]
