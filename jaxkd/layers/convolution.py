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

import jax
import jax.numpy as jnp

from jaxkd.layers.taps import input_gradient_by_taps, kernel_gradient_by_taps
from jaxkd.layers.winograd import (
    winograd_convolution,
    winograd_input_gradient,
    winograd_kernel_gradient,
)

Pair = tuple[int, int]

# Multiplications per batch below which nothing is to be gained, and compiling the other
# formulations takes longer than they save.
_FEWEST_PRODUCTS = 2**23
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
    top_bottom, left_right = (tuple(map(int, edges)) for edges in padding)
    window = _Window(
        images=lhs.shape,
        kernel=rhs.shape,
        strides=(int(window_strides[0]), int(window_strides[1])),
        padding=(top_bottom, left_right),
        precision=precision,
    )
    return _forward(lhs, rhs, window)


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

    images: tuple[int, ...]
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
        rows, columns = (
            (n + low + high - k) // stride + 1
            for n, (low, high), k, stride in zip(
                self.images[1:3], self.padding, self.size, self.strides, strict=True
            )
        )
        pixels = self.images[0] * rows * columns
        return min(rows, columns) > 1 and pixels * math.prod(self.kernel) >= (
            _FEWEST_PRODUCTS
        )

    @property
    def winograd(self) -> bool:
        return (
            self.worthwhile
            and self.size == (3, 3)
            and self.strides == (1, 1)
            and min(self.kernel[2:]) >= _FEWEST_CHANNELS
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _forward(images: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    fast = None
    if window.winograd:
        fast = functools.partial(winograd_convolution, padding=window.padding)
    return _choose(fast, window.plain, images, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _input_gradient(
    gradient: jax.Array, kernel: jax.Array, window: _Window
) -> jax.Array:
    fast = None
    if window.winograd:
        fast = functools.partial(winograd_input_gradient, padding=window.padding)
    elif window.worthwhile and max(window.strides) > 1 and max(window.size) <= 3:
        fast = functools.partial(
            input_gradient_by_taps,
            image_size=window.images[1:3],
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
    elif window.worthwhile and max(window.size) <= 3:
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


def _remember(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The forward rule: the value, and the two operands for the backward rule."""
    return lambda a, b, window: (function(a, b, window), (a, b))


_forward.defvjp(
    _remember(_forward),
    lambda window, operands, g: (
        _input_gradient(g, operands[1], window),
        _kernel_gradient(operands[0], g, window),
    ),
)
# `g` has the shape of the images, and stands in their place.
_input_gradient.defvjp(
    _remember(_input_gradient),
    lambda window, operands, g: (
        _forward(g, operands[1], window),
        _kernel_gradient(g, operands[0], window),
    ),
)
# `g` has the shape of the kernel.
_kernel_gradient.defvjp(
    _remember(_kernel_gradient),
    lambda window, operands, g: (
        _input_gradient(operands[1], g, window),
        _forward(operands[0], g, window),
    ),
)
