"""Network families; `create(name, **options)` builds any of them.

Every network is a Linen module called as `module(images, train=False) -> Outputs`,
with float images `[batch, height, width, channels]` of any number of channels and
variables in the collections "params" and "batch_stats".
"""

from jaxkd.models.registry import create, names, register
from jaxkd.models.resnet import ResNet, ResNetTrunk
from jaxkd.models.resnet_cifar import WideResNet
from jaxkd.models.resnet_segmentation import ResNetSegmenter
from jaxkd.models.unet import UNet
from jaxkd.models.unetpp import UNetPlusPlus

__all__ = [
    "ResNet",
    "ResNetSegmenter",
    "ResNetTrunk",
    "UNet",
    "UNetPlusPlus",
    "WideResNet",
    "create",
    "names",
    "register",
]
