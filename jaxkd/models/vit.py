"""Vision transformers in the sizes of DeiT, with and without a distillation token.

`deit_tiny`, `deit_small` and `deit_base` have 12 pre-norm blocks of widths 192, 384 and
768 with 3, 6 and 12 heads; they are timm's `deit_*_patch16_224`, and `*_distilled` its
`deit_*_distilled_patch16_224`. Images may have any size divisible by `patch_size`; the
positional embedding fixes it when the network is initialised. With a `width_factor`,
heads keep their number and change their width.

The tokens are a class token, the distillation token if there is one, and the patches
row by row: N + 1 or N + 2 for N patches. Taps, for L blocks of width c:

    stem            tokens with their positions          `[batch, tokens, c]`
    block1 ...      tokens after each block              `[batch, tokens, c]`
    stage1..stage4  those after L/4, L/2, 3L/4, L blocks `[batch, tokens, c]`
    tokens          the last ones after the final norm   `[batch, tokens, c]`
    pooled          the class token of `tokens`          `[batch, c]`

Logits are a linear layer of `pooled`. With a distillation token there are two such
layers, for the class token and for the distillation token; their results are the taps
`cls_logits` and `dist_logits`, the logits are the mean of both, and `head` is None.

The outputs of `qkv` are ordered by head first and by query, key and value second (in
timm it is the other way round). A part of its columns then holds whole heads, so that
the blocks can be split over the mesh axis `model` (`VisionTransformer.partition`).
"""

from __future__ import annotations

import collections
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkd.layers import (
    LayerNorm,
    Outputs,
    Partition,
    Remat,
    bias_uniform,
    fan_in_uniform,
    maybe_remat,
)
from jaxkd.layers.convolution import Conv
from jaxkd.layers.dense import Dense
from jaxkd.models._options import (
    check_images,
    checked_classes,
    checked_dtype,
    checked_rate,
    scaled,
)
from jaxkd.models.registry import register
from jaxkd.numerics import softmax

Tokens = Float[Array, "batch tokens width"]

# Widths of one head are 64.
HEADS = {"tiny": 3, "small": 6, "base": 12}

# Each device computes its heads and its hidden units: the layers before them are split
# by outputs, those after them by inputs, and the results of the latter are summed over
# the devices (Shoeybi et al., "Megatron-LM", 2019).
_SPLIT = {
    r"block\d+/attention/qkv/kernel": (None, "model"),
    r"block\d+/attention/qkv/bias": ("model",),
    r"block\d+/attention/project/kernel": ("model", None),
    r"block\d+/hidden/kernel": (None, "model"),
    r"block\d+/hidden/bias": ("model",),
    r"block\d+/output/kernel": ("model", None),
}

# The published truncated normal is cut at 100 standard deviations: a plain one.
_small_normal = nn.initializers.normal(0.02)


def _dense(features: int, *, dtype: Any, name: str) -> Dense:
    return Dense(features, kernel_init=_small_normal, dtype=dtype, name=name)


class SelfAttention(nn.Module):
    """Multi-head self-attention, with a softmax in float32.

    Attributes:
      heads: number of heads, a divisor of the width.
      dtype: dtype of the computation.

    Reference: Vaswani et al., "Attention Is All You Need", NeurIPS 2017.
    """

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        """Maps tokens `[b, n, c]` to tokens `[b, n, c]`."""
        batch, length, width = x.shape
        qkv = _dense(3 * width, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(batch, length, self.heads, 3, width // self.heads)
        query, key, value = qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
        query = query * query.shape[-1] ** -0.5
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        weights = softmax(scores, self.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return _dense(width, dtype=self.dtype, name="project")(y.reshape(x.shape))


class TransformerBlock(nn.Module):
    """Attention and a GELU layer of fourfold width, each normed first and added.

    Attributes:
      heads: number of heads.
      drop_path: share of examples for which a branch is left out in training.
      dtype: dtype of the computation.

    Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
    """

    heads: int
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens, train: bool) -> Tokens:
        """Maps tokens `[b, n, c]` to tokens `[b, n, c]`."""
        dtype, width = self.dtype, x.shape[-1]
        # Dropout with one draw per example, not per number: stochastic depth.
        drop = nn.Dropout(
            self.drop_path, broadcast_dims=(1, 2), deterministic=not train
        )
        y = LayerNorm(dtype=dtype, name="norm1")(x)
        x = x + drop(SelfAttention(self.heads, dtype=dtype, name="attention")(y))
        y = LayerNorm(dtype=dtype, name="norm2")(x)
        y = nn.gelu(_dense(4 * width, dtype=dtype, name="hidden")(y), approximate=False)
        return x + drop(_dense(width, dtype=dtype, name="output")(y))


class VisionTransformer(nn.Module):
    """Patches as tokens, transformer blocks, a linear classifier of the class token.

    Attributes:
      num_classes: number of logits.
      width: channels of a token.
      heads: number of heads, a divisor of the width.
      depth: number of blocks, a multiple of 4.
      patch_size: side of a patch in pixels.
      distilled: whether there is a distillation token with its own classifier.
      drop_path: rate of stochastic depth of the last block; it rises linearly from 0
        in the first one. Training then needs a key called "dropout".
      dtype: dtype of the computation.
      remat: what the backward pass recomputes, see `jaxkd.layers.Remat`.

    Reference: Touvron et al., "Training data-efficient image transformers &
    distillation through attention", ICML 2021.
    """

    num_classes: int
    width: int
    heads: int
    depth: int = 12
    patch_size: int = 16
    distilled: bool = False
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: Remat = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool = False
    ) -> Outputs:
        """Classifies images `[b, h, w, c]` into logits `[b, classes]`."""
        check_images(images, network="vit", multiple=self.patch_size)
        x = self._embed(images.astype(self.dtype))
        taps: dict[str, jax.Array] = collections.OrderedDict(stem=x)
        block = maybe_remat(TransformerBlock, self.remat)
        for i in range(self.depth):
            rate = self.drop_path * i / max(1, self.depth - 1)
            name = f"block{i + 1}"
            x = block(self.heads, drop_path=rate, dtype=self.dtype, name=name)(x, train)
            taps[name] = x
            if (i + 1) % (self.depth // 4) == 0:
                taps[f"stage{4 * (i + 1) // self.depth}"] = x
        tokens = LayerNorm(dtype=self.dtype, name="norm")(x)
        pooled = tokens[:, 0].astype(jnp.float32)
        taps["tokens"], taps["pooled"] = tokens, pooled
        logits = _dense(self.num_classes, dtype=jnp.float32, name="head")(pooled)
        if not self.distilled:
            head = self.get_variable("params", "head")
            return Outputs(logits=logits, taps=taps, head=head)
        second = _dense(self.num_classes, dtype=jnp.float32, name="head_dist")
        taps["cls_logits"] = logits
        taps["dist_logits"] = second(tokens[:, 1].astype(jnp.float32))
        logits = (taps["cls_logits"] + taps["dist_logits"]) / 2
        return Outputs(logits=logits, taps=taps)

    def partition(self) -> Partition:
        """How the blocks are split over the mesh axis `model`."""
        return Partition(rules=_SPLIT, units={"heads": self.heads})

    def _embed(self, images: Float[Array, "b h w c"]) -> Tokens:
        """The class token, the distillation token and the patches, with positions."""
        patch = (self.patch_size, self.patch_size)
        patches = Conv(
            self.width,
            patch,
            strides=patch,
            padding="VALID",
            kernel_init=fan_in_uniform,
            bias_init=bias_uniform(self.patch_size**2 * images.shape[-1]),
            dtype=self.dtype,
            name="patches",
        )(images)
        batch, rows, columns, width = patches.shape
        names = ["cls_token", "dist_token"] if self.distilled else ["cls_token"]
        prefix = [self.param(name, _small_normal, (1, 1, width)) for name in names]
        length = rows * columns + len(prefix)
        known = self.get_variable("params", "positions")
        if known is not None and known.shape[1] != length:
            raise ValueError(
                f"the network was initialised for {known.shape[1] - len(prefix)} "
                f"patches, got {rows * columns} from images of shape "
                f"{images.shape[1:]}; keep the image size of the initialisation"
            )
        positions = self.param("positions", _small_normal, (1, length, width))
        tokens = [
            *(jnp.broadcast_to(token, (batch, 1, width)) for token in prefix),
            patches.reshape(batch, rows * columns, width),
        ]
        x = jnp.concatenate([token.astype(self.dtype) for token in tokens], axis=1)
        return x + jnp.broadcast_to(positions.astype(self.dtype), x.shape)


def _register(size: str, distilled: bool) -> None:
    @register(f"deit_{size}_distilled" if distilled else f"deit_{size}")
    def factory(
        *,
        num_classes: int,
        width_factor: float = 1.0,
        patch_size: int = 16,
        depth: int = 12,
        drop_path: float = 0.0,
        dtype: Any = jnp.float32,
        remat: Remat = False,
    ) -> VisionTransformer:
        if patch_size < 1:
            raise ValueError(f"patch_size must be >= 1, got {patch_size}")
        if depth < 4 or depth % 4:
            raise ValueError(f"depth must be a multiple of 4 above 0, got {depth}")
        heads = HEADS[size]
        (head_width,) = scaled((64,), width_factor)
        return VisionTransformer(
            num_classes=checked_classes(num_classes),
            width=heads * head_width,
            heads=heads,
            depth=depth,
            patch_size=patch_size,
            distilled=distilled,
            drop_path=checked_rate("drop_path", drop_path),
            dtype=checked_dtype(dtype),
            remat=remat,
        )


for _size in HEADS:
    _register(_size, False)
    _register(_size, True)
