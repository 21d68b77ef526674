"""Encoder and decoder that stand for the first part of a ResNet in split computing.

A device runs the encoder and sends its few channels; a server runs the decoder, which
restores the map of stage 2, and the rest of the network. For images of height H = 224
and the large stem (s stride, p padding, c the channels sent; all convolutions without
bias; a norm is a batch norm and a ReLU):

    version 2  encoder: conv 7x7 s2 p3, norm, max-pool 3x3 s2 p1, norm     56
                        conv 2x2 s2 p1 to c                                29 x 29 x c
               decoder: norm, conv 2x2 p1, norm, conv 2x2 p1, norm         31
                        conv 2x2, norm, conv 2x2, average pool 2x2 s1      28
    version 1  encoder: conv 7x7 s2 p3 to c, norm, max-pool 3x3 s2 p1      56 x 56 x c
               decoder: norm, conv 2x2 s2 p1 to the stem's width           29
                        then as version 2
    version 3  encoder: as version 2 but conv 2x2 s2 p1 to stage 2's width,
                        norm, and a second conv 2x2 s2 p1 to c             15 x 15 x c
               decoder: norm, transposed conv 2x2 s2, norm                 30
                        conv 2x2 p1, norm, conv 2x2, norm                  30
                        conv 2x2, average pool 2x2 s1                      28

A 2x2 convolution with a padding of one on every side makes the map one pixel larger.
The result has the size of stage 2 if the image's is a multiple of 8 (version 3: of 16);
otherwise it may be off by a pixel or two, which the rest of the network accepts.
With the small stem of CIFAR networks (ours; nothing is published for it) a 3x3
convolution of stride 1 and one norm take the place of 7x7, norm, max-pool and norm,
and sizes must be a multiple of 2 (4) instead.

Reference: Matsubara et al., "BottleFit: Learning Compressed Representations in Deep
Neural Networks for Effective and Efficient Split Computing", WoWMoM 2022, and the
authors' code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array, Float

from jaxkd.layers.blocks import Maps, NewMaps
from jaxkd.layers.convolution import Conv
from jaxkd.layers.initializers import fan_in_uniform
from jaxkd.layers.norm import BatchNorm
from jaxkd.layers.pooling import max_pool
from jaxkd.layers.remat import Remat, maybe_remat
from jaxkd.numerics import affine_dequantize, affine_quantize

Code = Float[Array, "batch code_height code_width code_channels"]
Version = Literal[1, 2, 3]
Bits = Literal[8, 16]
Width = Literal["stem", "code", "stage"]

# The scale (float32) and the zero point (int32) that travel with 8-bit integers.
_HEADER_BYTES = 8


@dataclasses.dataclass(frozen=True)
class _Conv:
    """A convolution without bias; its output width by name."""

    width: Width
    kernel_size: int = 2
    stride: int = 1
    padding: int = 0
    transposed: bool = False

    def size(self, n: int) -> int:
        """Output pixels along an axis of `n`."""
        if self.transposed:
            return n * self.stride
        return (n + 2 * self.padding - self.kernel_size) // self.stride + 1


_Layer = _Conv | Literal["norm", "max_pool", "average_pool"]


def _layers(version: Version, small: bool) -> tuple[tuple[_Layer, ...], ...]:
    """The layers of the encoder and of the decoder."""
    first: Width = "code" if version == 1 else "stem"
    encoder: list[_Layer] = (
        [_Conv(first, 3, padding=1), "norm"]
        if small
        else [_Conv(first, 7, stride=2, padding=3), "norm", "max_pool"]
    )
    grow, keep = _Conv("stage", padding=1), _Conv("stage")
    if version > 1 and not small:
        encoder.append("norm")
    if version == 3:
        encoder += [_Conv("stage", stride=2, padding=1), "norm"]
    if version > 1:
        encoder.append(_Conv("code", stride=2, padding=1))
    first_up = {
        1: (_Conv("stem", stride=2, padding=1), "norm", grow),
        2: (grow,),
        3: (_Conv("stage", stride=2, transposed=True),),
    }[version]
    decoder = ("norm", *first_up, "norm", grow, "norm", keep, "norm", keep)
    return tuple(encoder), (*decoder, "average_pool")


class _Sequence(nn.Module):
    """Layers in a row; convolutions and norms are numbered from 1."""

    layers: tuple[_Layer, ...]
    widths: tuple[int, int, int]
    dtype: Any

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps:
        widths = dict(zip(("stem", "code", "stage"), self.widths, strict=True))
        convs = norms = 0
        for layer in self.layers:
            if layer == "norm":
                norms += 1
                norm = BatchNorm(dtype=self.dtype, name=f"norm{norms}")
                x = nn.relu(norm(x, train))
            elif layer == "max_pool":
                x = max_pool(x, window=3, stride=2, padding=1)
            elif layer == "average_pool":
                x = nn.avg_pool(x, (2, 2))
            else:
                convs += 1
                x = self._conv(layer, widths[layer.width], f"conv{convs}")(x)
        return x

    def _conv(self, layer: _Conv, width: int, name: str) -> nn.Module:
        options = {
            "strides": (layer.stride, layer.stride),
            "use_bias": False,
            "dtype": self.dtype,
            "name": name,
        }
        window = (layer.kernel_size, layer.kernel_size)
        if layer.transposed:
            # PyTorch takes the fan-in of a transposed kernel over its outputs.
            init = initializers.variance_scaling(1 / 3, "fan_out", "uniform")
            return nn.ConvTranspose(
                width, window, padding="VALID", kernel_init=init, **options
            )
        padding = ((layer.padding, layer.padding),) * 2
        return Conv(
            width, window, padding=padding, kernel_init=fan_in_uniform, **options
        )


class BottleneckCodec(nn.Module):
    """From images to the map of stage 2 through a few channels (module docstring).

    Its parameters are those of its children "encoder" and "decoder". In training the
    code passes as it is; in evaluation it is quantised as it would be sent.

    Attributes:
      channels: channels of the code that is sent.
      stem_width: channels of the first convolution.
      stage_width: channels of stage 2.
      version: 1, 2 or 3.
      small: whether images are small (CIFAR's stem).
      bits: None: the code is sent as float32; 16: as float16; 8: as integers with a
        scale and a zero point.
      per_sample: whether, at 8 bits, each image has its own scale; otherwise the batch
        has one, as in the published code.
      dtype: dtype of the computation.
      remat: what the backward pass recomputes, see `jaxkd.layers.Remat`; encoder and
        decoder are a block each.
    """

    channels: int
    stem_width: int
    stage_width: int
    version: Version = 2
    small: bool = False
    bits: Bits | None = None
    per_sample: bool = True
    dtype: Any = jnp.float32
    remat: Remat = False

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
          ValueError: no channels, or an unknown version or number of bits.
        """
        if self.channels < 1:
            raise ValueError(f"bottleneck_channels must be >= 1, got {self.channels}")
        if self.version not in (1, 2, 3):
            raise ValueError(f"version must be 1, 2 or 3, got {self.version}")
        if self.bits not in (None, 8, 16):
            raise ValueError(f"bits must be None, 8 or 16, got {self.bits}")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Maps, train: bool) -> tuple[Code, NewMaps]:
        """Returns the code and the map of stage 2."""
        widths = (self.stem_width, self.channels, self.stage_width)
        part = maybe_remat(_Sequence, self.remat)
        encoder, decoder = (
            part(layers, widths, self.dtype, name=name)
            for name, layers in zip(
                ("encoder", "decoder"), _layers(self.version, self.small), strict=True
            )
        )
        code = encoder(images.astype(self.dtype), train)
        return code, decoder(code if train else self._received(code), train)

    def _received(self, code: jax.Array) -> jax.Array:
        """The code after it was sent."""
        if self.bits is None:
            return code
        if self.bits == 16:
            return code.astype(jnp.float16).astype(code.dtype)
        sent = affine_quantize(code, bits=self.bits, per_sample=self.per_sample)
        return affine_dequantize(sent).astype(code.dtype)

    def bytes_sent(self, size: Sequence[int]) -> int:
        """Bytes on the wire for one image of `(height, width)`."""
        height, width = size
        for layer in _layers(self.version, self.small)[0]:
            if layer == "max_pool":
                layer = _Conv("stem", 3, stride=2, padding=1)
            if isinstance(layer, _Conv):
                height, width = layer.size(height), layer.size(width)
        numbers = height * width * self.channels
        if self.bits == 8:
            return numbers + _HEADER_BYTES
        return numbers * (2 if self.bits == 16 else 4)
