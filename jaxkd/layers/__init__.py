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
from jaxkd.layers.norm import BatchNorm
from jaxkd.layers.outputs import NetworkSpec, Outputs
from jaxkd.layers.partition import Partition
from jaxkd.layers.pooling import max_pool

__all__ = [
    "BasicBlock",
    "BatchNorm",
    "Bottleneck",
    "BottleneckCodec",
    "ConvNormRelu",
    "DoubleConv",
    "NetworkSpec",
    "Outputs",
    "Partition",
    "PreActivationBlock",
    "bias_uniform",
    "biased_conv",
    "conv",
    "fan_in_uniform",
    "kaiming_normal",
    "max_pool",
]
