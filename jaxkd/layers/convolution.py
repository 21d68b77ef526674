"""Convolutions that are as fast on a laptop's CPU as XLA lets them be.

`convolution` stands in for `jax.lax.conv_general_dilated`. On GPUs, TPUs and several
devices it is that very operation, with JAX's own gradients. On a single CPU device, the
common convolutions of float32 images run in the formulations of `jaxkd.layers.winograd`
and `jaxkd.layers.taps`, which sum the same products in another order.

The convolution and its two gradients are bilinear, and the gradients of each are again
the other two; so three rules give derivatives of any order in reverse mode.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes
from jax.ad_checkpoint import checkpoint_name

from jaxkd.layers import rules
from jaxkd.layers.remat import KEPT
from jaxkd.layers.taps import (
    convolution_by_taps,
    input_gradient_by_taps,
    kernel_gradient_by_taps,
)
from jaxkd.layers.winograd import (
    winograd_convolution,
    winograd_input_gradient,
    winograd_kernel_gradient,
)

Pair = tuple[int, int]

# Multiplications per batch below which nothing is to be gained, and compiling the other
# formulations takes longer than they save.
_FEWEST_PRODUCTS = 2**20
# Fewer channels on either side leave Winograd's matrix products too thin.
_FEWEST_CHANNELS = 16
_IMAGES = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))

_plain = contextvars.ContextVar("plain_convolutions", default=False)


@contextlib.contextmanager
def plain_convolutions() -> Iterator[None]:
    """Within it, what is traced has XLA's convolutions on every device.

    For what reads or differentiates the program itself: export to other formats, and
    forward-mode derivatives (`jax.jvp`), which the rules here do not have.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[Pair],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, in whatever formulation is the fastest.

    Args:
      lhs: images, `[batch, height, width, channels]` for the fast ones.
      rhs: kernel, `[height, width, in, out]` for the fast ones.
      window_strides: as for `jax.lax.conv_general_dilated`, and so are all others.
      padding: see there.
      lhs_dilation: see there.
      rhs_dilation: see there.
      dimension_numbers: see there.
      feature_group_count: see there.
      batch_group_count: see there.
      precision: see there; on the CPU all convolutions of float32 have full precision.
      preferred_element_type: see there.
    """
    numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    dense = feature_group_count == batch_group_count == 1 and all(
        dilation is None or set(dilation) == {1}
        for dilation in (lhs_dilation, rhs_dilation)
    )
    if (
        not _on_single_cpu()
        or not dense
        or numbers != _IMAGES
        or not lhs.dtype == rhs.dtype == jnp.float32
        or preferred_element_type not in (None, jnp.float32)
    ):
        return jax.lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(
            lhs.shape[1:3], rhs.shape[:2], window_strides, padding
        )
    (top, bottom), (left, right) = padding
    window = _Window(
        images=lhs.shape,
        kernel=rhs.shape,
        strides=(int(window_strides[0]), int(window_strides[1])),
        padding=((int(top), int(bottom)), (int(left), int(right))),
        precision=precision,
    )
    return checkpoint_name(_forward(lhs, rhs, window), KEPT)


class Conv(nn.Conv):
    """`flax.linen.Conv` with this convolution, obeying `jaxkd.layers.rules`."""

    conv_general_dilated: Any = convolution
    # As there, of a type that can be checked at run time.
    promote_dtype: Any = dtypes.promote_dtype

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `[..., height, width, channels]` to `[..., new_h, new_w, features]`."""
        return rules.obey(self, super().__call__, inputs)


def _on_single_cpu() -> bool:
    """Whether this process has one device, a CPU.

    Work on a few images at a time would send images from device to device if there were
    several.
    """
    if _plain.get():
        return False
    return jax.default_backend() == "cpu" and jax.device_count() == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Window:
    """What is static of a convolution of NHWC images and an HWIO kernel."""

    images: tuple[Any, ...]  # the batch may be symbolic
    kernel: tuple[int, ...]
    strides: Pair
    padding: tuple[Pair, Pair]
    precision: Any

    def plain(self, images: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            self.strides,
            self.padding,
            dimension_numbers=_IMAGES,
            precision=self.precision,
        )

    def plain_input_gradient(self, gradient: jax.Array, kernel: jax.Array) -> jax.Array:
        images = jax.ShapeDtypeStruct(self.images, kernel.dtype)
        transpose = jax.linear_transpose(lambda x: self.plain(x, kernel), images)
        return transpose(gradient)[0]

    def plain_kernel_gradient(
        self, images: jax.Array, gradient: jax.Array
    ) -> jax.Array:
        kernel = jax.ShapeDtypeStruct(self.kernel, images.dtype)
        transpose = jax.linear_transpose(lambda k: self.plain(images, k), kernel)
        return transpose(gradient)[0]

    @property
    def size(self) -> Pair:
        return self.kernel[0], self.kernel[1]

    @property
    def worthwhile(self) -> bool:
        """Whether another formulation can gain more than it costs to compile."""
        shapes = (*self.images, *self.kernel)
        if not all(isinstance(n, int) for n in shapes):  # symbolic, in an export
            return False
        rows, columns = (
            (n + low + high - k) // stride + 1
            for n, (low, high), k, stride in zip(
                self.images[1:3], self.padding, self.size, self.strides, strict=True
            )
        )
        products = self.images[0] * rows * columns * math.prod(self.kernel)
        return min(rows, columns) > 1 and products >= _FEWEST_PRODUCTS

    @property
    def winograd(self) -> bool:
        return (
            self.worthwhile
            and self.size == (3, 3)
            and self.strides == (1, 1)
            and min(self.kernel[2:]) >= _FEWEST_CHANNELS
        )

    @property
    def by_taps(self) -> bool:
        return self.worthwhile and max(self.size) <= 3


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _forward(images: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    fast = None
    if window.winograd:
        fast = functools.partial(winograd_convolution, padding=window.padding)
    elif window.by_taps:
        fast = functools.partial(
            convolution_by_taps, strides=window.strides, padding=window.padding
        )
    return _choose(fast, window.plain, images, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _input_gradient(
    gradient: jax.Array, kernel: jax.Array, window: _Window
) -> jax.Array:
    fast = None
    strided = max(window.strides) > 1
    if window.winograd:
        fast = functools.partial(winograd_input_gradient, padding=window.padding)
    # XLA's own is as fast for strided 1x1 convolutions and for the first layer.
    elif window.by_taps and strided == (max(window.size) > 1):
        fast = functools.partial(
            input_gradient_by_taps,
            image_size=(window.images[1], window.images[2]),
            strides=window.strides,
            padding=window.padding,
        )
    return _choose(fast, window.plain_input_gradient, gradient, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _kernel_gradient(
    images: jax.Array, gradient: jax.Array, window: _Window
) -> jax.Array:
    fast = None
    if window.winograd:
        fast = functools.partial(winograd_kernel_gradient, padding=window.padding)
    elif window.by_taps:
        fast = functools.partial(
            kernel_gradient_by_taps,
            size=window.size,
            strides=window.strides,
            padding=window.padding,
        )
    return _choose(fast, window.plain_kernel_gradient, images, gradient)


def _choose(
    fast: Callable[..., jax.Array] | None,
    plain: Callable[..., jax.Array],
    *operands: jax.Array,
) -> jax.Array:
    """`fast` where the program is compiled for a CPU, `plain` elsewhere."""
    if fast is None:
        return plain(*operands)
    return jax.lax.platform_dependent(*operands, cpu=fast, default=plain)


_Rule = Callable[..., Any]


def _bilinear(function: Any, first: _Rule, second: _Rule) -> None:
    """Defines the gradients of `function(a, b)`: `first(g, b)` and `second(a, g)`."""

    def forward(a: jax.Array, b: jax.Array, window: _Window) -> tuple[Any, Any]:
        return function(a, b, window), (a, b)

    def backward(window: _Window, operands: Any, g: jax.Array) -> tuple[Any, Any]:
        a, b = operands
        return first(g, b, window), second(a, g, window)

    function.defvjp(forward, backward)


# A gradient has the shape of what it is the gradient of, and stands in its place.
_bilinear(_forward, _input_gradient, _kernel_gradient)
_bilinear(
    _input_gradient,
    _forward,
    lambda a, g, window: _kernel_gradient(g, a, window),
)
_bilinear(
    _kernel_gradient,
    lambda g, b, window: _input_gradient(b, g, window),
    lambda a, g, window: _forward(a, g, window),
)
