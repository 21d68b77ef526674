"""Losses of large logits, evaluated block by block.

On its way from logits to one value per row a loss makes several arrays of the size of
the logits, in float32, and a compiler keeps some of them: of `kd` four. At ImageNet-21k
or at 512x512 pixels that is more memory than the logits themselves take. `rowwise`
evaluates such a loss on one block of rows after the other and forms the gradient with
the value, so that beside the gradient only a block's arrays exist at a time.

Small logits, and calls outside of `jax.jit` and `jax.grad`, are evaluated at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero

P = ParamSpec("P")
Arrays = dict[str, jax.Array]
Call = Callable[[Arrays, Arrays], jax.Array]

# Logits per device above which memory matters: 16 MiB in float32.
MIN_SIZE = 2**22
BLOCKS = 16


def rowwise(
    loss: Callable[P, jax.Array], *, narrow_only: bool = False
) -> Callable[P, jax.Array]:
    """Decorates a loss whose value for a row depends on that row alone.

    A row is an example or a pixel: the logits, the first argument, are `[*rows,
    classes]`, the values `[*rows]`. Every other argument is an array that begins with
    the same axes, a scalar, or no array. Values and derivatives of any order, forward
    or reverse, are those of the loss itself, up to rounding.

    The first derivative is held between the forward and the backward pass in the
    dtype of the logits. Derivatives of higher order, and those with respect to scalars,
    are not evaluated in blocks.

    Examples `[batch, classes]` are taken to be spread over all devices; every block
    then has as many rows of each.

    Args:
      loss: called as `loss(logits, ..., **options)`.
      narrow_only: evaluates only logits of 16 bits in blocks; for a loss that makes no
        array of the size of float32 logits.
    """
    names = tuple(inspect.signature(loss).parameters)

    @functools.wraps(loss)
    def in_blocks(*args: P.args, **kwargs: P.kwargs) -> jax.Array:
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        logits = given.get(names[0])
        blocks = None if narrow_only and not _is_narrow(logits) else _blocks(logits)
        sorted_out = None if blocks is None else _sort(given, names[0])
        if blocks is None or sorted_out is None:
            return loss(*args, **kwargs)
        rows, scalars, options = sorted_out

        def call(rows: Arrays, scalars: Arrays) -> jax.Array:
            return loss(**rows, **scalars, **options)  # type: ignore

        return _values(call, blocks, rows, scalars)

    return in_blocks


class _Blocks(NamedTuple):
    """How rows are divided: every `count`-th example, or `count` stripes of each map.

    Either keeps a device's examples on that device.
    """

    count: int
    stripes: bool

    def divide(self, x: jax.Array) -> jax.Array:
        """Gives `x` the blocks as its axis 1."""
        if self.stripes:
            return x.reshape(x.shape[0], self.count, -1, *x.shape[2:])
        return x.reshape(-1, self.count, *x.shape[1:])

    def join(self, x: jax.Array) -> jax.Array:
        """Undoes `divide`."""
        if self.stripes:
            return x.reshape(x.shape[0], -1, *x.shape[3:])
        return x.reshape(-1, *x.shape[2:])


def _blocks(logits: Any) -> _Blocks | None:
    """The blocks of large logits; None for logits that are evaluated at once."""
    if not isinstance(logits, Tracer) or logits.ndim < 2:
        return None
    devices = jax.device_count()
    if logits.size < MIN_SIZE * devices:
        return None
    stripes = logits.ndim > 2
    length = logits.shape[1 if stripes else 0]
    if not stripes and length % devices == 0:
        length //= devices
    above = (n for n in range(BLOCKS, 4 * BLOCKS + 1) if length % n == 0)
    below = (n for n in range(BLOCKS - 1, 0, -1) if length % n == 0)
    return _Blocks(next(above, None) or next(below), stripes)


def _sort(
    given: Mapping[str, Any], logits: str
) -> tuple[Arrays, Arrays, dict[str, Any]] | None:
    """Sorts arguments into arrays with rows, scalars and others; None if one is odd."""
    shape = given[logits].shape[:-1]
    rows, scalars, options = {}, {}, {}
    for name, value in given.items():
        if value is None or isinstance(value, bool | int | float | str):
            options[name] = value
        elif not hasattr(value, "shape"):
            return None
        elif value.shape == ():
            scalars[name] = jnp.asarray(value)
        elif value.shape[: len(shape)] == shape:
            rows[name] = jnp.asarray(value)
        else:
            return None
    return rows, scalars, options


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _values(call: Call, blocks: _Blocks, rows: Arrays, scalars: Arrays) -> jax.Array:
    return _each_block(lambda block: call(block, scalars), blocks, rows)


@functools.partial(_values.defjvp, symbolic_zeros=True)
def _values_jvp(call: Call, blocks: _Blocks, primals: Any, tangents: Any) -> Any:
    rows, scalars = primals
    moving, moving_scalars = (_not_zero(t) for t in tangents)
    if moving_scalars:
        return jax.jvp(
            lambda r, s: call({**rows, **r}, {**scalars, **s}),
            ({k: rows[k] for k in moving}, {k: scalars[k] for k in moving_scalars}),
            (moving, moving_scalars),
        )
    values, slopes = _slopes(call, blocks, tuple(moving), rows, scalars)
    tangent = jnp.zeros_like(values)
    for name, slope in slopes.items():
        product = slope.astype(values.dtype) * moving[name].astype(values.dtype)
        tangent += jnp.sum(product, axis=tuple(range(values.ndim, product.ndim)))
    return values, tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _slopes(
    call: Call, blocks: _Blocks, names: tuple[str, ...], rows: Arrays, scalars: Arrays
) -> tuple[jax.Array, Arrays]:
    """The values, and the gradient of each with respect to its rows of `names`."""
    return _each_block(
        lambda block: _value_and_slopes(call, names, block, scalars), blocks, rows
    )


@functools.partial(_slopes.defjvp, symbolic_zeros=True)
def _slopes_jvp(
    call: Call, blocks: _Blocks, names: tuple[str, ...], primals: Any, tangents: Any
) -> Any:
    del blocks
    rows, scalars = primals
    moving, moving_scalars = (_not_zero(t) for t in tangents)
    return jax.jvp(
        lambda r, s: _value_and_slopes(call, names, {**rows, **r}, {**scalars, **s}),
        ({k: rows[k] for k in moving}, {k: scalars[k] for k in moving_scalars}),
        (moving, moving_scalars),
    )


def _value_and_slopes(
    call: Call, names: tuple[str, ...], rows: Arrays, scalars: Arrays
) -> tuple[jax.Array, Arrays]:
    values, pull = jax.vjp(
        lambda moving: call({**rows, **moving}, scalars), {k: rows[k] for k in names}
    )
    (slopes,) = pull(jnp.ones_like(values))
    return values, slopes


def _not_zero(tangents: Mapping[str, Any]) -> dict[str, Any]:
    return {k: t for k, t in tangents.items() if not isinstance(t, SymbolicZero)}


def _each_block(
    function: Callable[[Arrays], Any], blocks: _Blocks, rows: Arrays
) -> Any:
    """Applies a function to the blocks, one after the other, and joins its results."""
    parts = {k: blocks.divide(_bits(x)) for k, x in rows.items()}

    def results(i: jax.Array | int) -> Any:
        block = {
            k: jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)
            for k, x in parts.items()
        }
        return function({k: _from_bits(x, rows[k].dtype) for k, x in block.items()})

    shapes = jax.eval_shape(results, 0)
    empty = jax.tree.map(
        lambda s: jnp.zeros((s.shape[0], blocks.count, *s.shape[1:]), s.dtype), shapes
    )

    def body(i: jax.Array, done: Any) -> Any:
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_index_in_dim(
                whole, _bits(part), i, axis=1
            ),
            done,
            results(i),
        )

    done = jax.lax.fori_loop(0, blocks.count, body, jax.tree.map(_bits, empty))
    return jax.tree.map(lambda x, s: _from_bits(blocks.join(x), s.dtype), done, shapes)


def _bits(x: jax.Array) -> jax.Array:
    """Narrow floats as integers: to slice them, a CPU would widen the whole array."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if _is_narrow(x) else x


def _from_bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _is_narrow(x: Any) -> bool:
    dtype = jnp.dtype(getattr(x, "dtype", jnp.float32))
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2
