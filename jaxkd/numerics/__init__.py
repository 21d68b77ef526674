"""Small exact array functions that losses, layers and data share."""

from jaxkd.numerics.compressed_labels import (
    compress_labels,
    kept_classes,
    recover_labels,
)
from jaxkd.numerics.indexing import along_axis, take_constant
from jaxkd.numerics.normalize import l2_normalize
from jaxkd.numerics.pooling import adaptive_average_pool
from jaxkd.numerics.products import product_in_float32
from jaxkd.numerics.quantize_affine import (
    AffineQuantized,
    affine_dequantize,
    affine_quantize,
)
from jaxkd.numerics.resize import resize_bilinear, resize_nearest
from jaxkd.numerics.softmax import log_normalizer, pick, softmax

__all__ = [
    "AffineQuantized",
    "adaptive_average_pool",
    "affine_dequantize",
    "affine_quantize",
    "along_axis",
    "compress_labels",
    "kept_classes",
    "l2_normalize",
    "log_normalizer",
    "pick",
    "product_in_float32",
    "recover_labels",
    "resize_bilinear",
    "resize_nearest",
    "softmax",
    "take_constant",
]
