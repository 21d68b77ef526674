"""Network families; `create(name, **options)` builds any of them.

Every network is a Linen module called as `module(images, train=False) -> Outputs`,
with float images `[batch, height, width, channels]` of any number of channels and
variables in the collections "params" and, if it has batch norms, "batch_stats".
"""

from jaxkd.models.bottlefit import BottleFit, BottleFitSegmenter
from jaxkd.models.mobilenetv2 import MobileNetV2
from jaxkd.models.registry import create, names, register
from jaxkd.models.resnet import ResNet, ResNetTrunk
from jaxkd.models.resnet_cifar import WideResNet
from jaxkd.models.resnet_segmentation import ResNetSegmenter
from jaxkd.models.shufflenetv1 import ShuffleNetV1
from jaxkd.models.shufflenetv2 import ShuffleNetV2
from jaxkd.models.unet import UNet
from jaxkd.models.unetpp import UNetPlusPlus
from jaxkd.models.vgg import VGG
from jaxkd.models.vit import VisionTransformer

__all__ = [
    "VGG",
    "BottleFit",
    "BottleFitSegmenter",
    "MobileNetV2",
    "ResNet",
    "ResNetSegmenter",
    "ResNetTrunk",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "UNet",
    "UNetPlusPlus",
    "VisionTransformer",
    "WideResNet",
    "create",
    "names",
    "register",
]
