"""Small exact array functions that losses, layers and data share."""

from jaxkd.numerics.indexing import along_axis, take_constant
from jaxkd.numerics.normalize import l2_normalize
from jaxkd.numerics.resize import resize_bilinear, resize_nearest

__all__ = [
    "along_axis",
    "l2_normalize",
    "resize_bilinear",
    "resize_nearest",
    "take_constant",
]
