"""U-Net++ (nested U-Net) without deep supervision.

Node X(i, j) at level i sees all nodes to its left and, doubled bilinearly with aligned
corners, the node below: `concat[X(i, 0..j-1), up(X(i+1, j-1))]`. 36,628,546 parameters
for one input channel and two classes. Height and width must be multiples of 16.

Taps at width factor 1 for images of height H (width alike). They are those of HLFD's
code and do not follow the depth: e3 is a decoder node, d5 to d3 have full resolution.

    e1 X(1,0) H/2 128 | e2 X(2,0) H/4 256 | e3 X(1,1) H/2 128 | e4 X(3,0) H/8 512
    e5 X(4,0) H/16 1024 | d5 X(0,1) H 64 | d4 X(0,2) H 64 | d3 X(0,3) H 64
    d2 X(1,3) H/2 128 | out H classes (the logits)
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.layers import DoubleConv, Outputs, Remat, max_pool, maybe_remat
from jaxkd.models._options import (
    check_images,
    checked_classes,
    checked_dtype,
    scaled,
)
from jaxkd.models.registry import register
from jaxkd.models.unet import WIDTHS, head
from jaxkd.numerics import resize_bilinear

_TAPS = {
    "e1": (1, 0),
    "e2": (2, 0),
    "e3": (1, 1),
    "e4": (3, 0),
    "e5": (4, 0),
    "d5": (0, 1),
    "d4": (0, 2),
    "d3": (0, 3),
    "d2": (1, 3),
}


class UNetPlusPlus(nn.Module):
    """U-Net++ of five levels (see the module docstring for its taps).

    Attributes:
      num_classes: channels of the logits.
      widths: channels of the five levels, finest first.
      dtype: dtype of the computation.
      remat: what the backward pass recomputes, see `jaxkd.layers.Remat`.

    Reference: Zhou et al., "UNet++: A Nested U-Net Architecture for Medical Image
    Segmentation", DLMIA 2018.
    """

    num_classes: int
    widths: Sequence[int] = WIDTHS
    dtype: Any = jnp.float32
    remat: Remat = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool = False
    ) -> Outputs:
        """Segments images `[b, h, w, c]` into logits `[b, h, w, classes]`."""
        levels = len(self.widths)
        check_images(images, network="unetpp", multiple=2 ** (levels - 1))
        block = maybe_remat(DoubleConv, self.remat)

        def node(i: int, j: int, x: Float[Array, "b h w c"]) -> Float[Array, "..."]:
            width = self.widths[i]
            return block(width, dtype=self.dtype, name=f"node{i}{j}")(x, train)

        nodes = {(0, 0): node(0, 0, images.astype(self.dtype))}
        for i in range(1, levels):
            nodes[i, 0] = node(i, 0, max_pool(nodes[i - 1, 0], window=2, stride=2))
        for j in range(1, levels):
            for i in range(levels - j):
                left = [nodes[i, k] for k in range(j)]
                size = left[0].shape[1:3]
                up = resize_bilinear(nodes[i + 1, j - 1], size, align_corners=True)
                nodes[i, j] = node(i, j, jnp.concatenate([*left, up], axis=-1))

        taps = collections.OrderedDict((tap, nodes[at]) for tap, at in _TAPS.items())
        taps["out"] = head(nodes[0, levels - 1], self.num_classes)
        return Outputs(logits=taps["out"], taps=taps)


@register()
def unetpp(
    *,
    num_classes: int,
    width_factor: float = 1.0,
    dtype: Any = jnp.float32,
    remat: Remat = False,
) -> UNetPlusPlus:
    """The U-Net++ of HLFD's code; options as in `jaxkd.models.registry`."""
    return UNetPlusPlus(
        num_classes=checked_classes(num_classes),
        widths=scaled(WIDTHS, width_factor),
        dtype=checked_dtype(dtype),
        remat=remat,
    )
