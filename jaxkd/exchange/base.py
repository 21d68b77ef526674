"""What an exchange of gradients is, and what all exchanges share.

Functions here run on one device of several: inside `jax.shard_map` (or `jax.vmap` with
an `axis_name`, as some tests do), where `axis` names the devices that exchange.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxkd.registry import Registry

Arrays = dict[str, jax.Array]
"""Arrays by their paths."""
State = Any

_REGISTRY = Registry("exchange", "jaxkd.exchange")

register = _REGISTRY.register
names = _REGISTRY.names


@runtime_checkable
class ExchangeFn(Protocol):
    """`update(gradients, state, *, step, key) -> (gradients, state)`."""

    def __call__(
        self, gradients: Any, state: State, *, step: Any, key: Any
    ) -> tuple[Any, State]:
        """Returns what the optimiser applies, equal on all devices."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """How devices turn their own gradients into one that all of them apply.

    In the manner of an optax transformation, but for one device among several: what it
    gets and what it remembers differ from device to device.

    Attributes:
      init: `init(params) -> state`, of one device.
      update: see `ExchangeFn`. `step` counts from 0 and is equal everywhere, `key` is
        a random key of this device and step.
      has_momentum: whether what it returns has momentum in it already, so that the
        optimiser must apply none.
    """

    init: Callable[[Any], State]
    update: ExchangeFn
    has_momentum: bool = False


def create(name: str, /, **options: Any) -> Exchange:
    """Makes the exchange `name`.

    Args:
      name: one of `names()`, or `"package.module:function"` for one of your own.
      **options: of its factory.

    Raises:
      KeyError: no such exchange; the message gives the nearest one.
      TypeError: an option that it does not take, or of a wrong type.
      ValueError: an impossible value.
    """
    made = _REGISTRY.create(name, **options)
    if not isinstance(made, Exchange):
        raise TypeError(
            f"{name!r} must return a jaxkd.exchange.Exchange, got {type(made).__name__}"
        )
    return made


def when_finite(update: ExchangeFn, axis: str) -> ExchangeFn:
    """The exchange, which leaves out a step if any device's gradient is not finite.

    Then all devices get zeros and remember what they did before: one infinite number
    in an error feedback would stay there for ever.

    Args:
      update: the exchange.
      axis: the devices; they send one number each.
    """

    def guarded(
        gradients: Any, state: State, *, step: Any, key: Any
    ) -> tuple[Any, State]:
        bad = [jnp.any(~jnp.isfinite(g)) for g in jax.tree.leaves(gradients)]
        count = jnp.any(jnp.stack(bad)).astype(jnp.float32)
        finite = jax.lax.psum(count, axis) == 0
        clean = jax.tree.map(
            lambda g: jnp.where(finite, g, 0).astype(g.dtype), gradients
        )
        new, after = update(clean, state, step=step, key=key)
        new = jax.tree.map(lambda g: jnp.where(finite, g, 0).astype(g.dtype), new)
        after = jax.tree.map(lambda a, b: jnp.where(finite, a, b), after, state)
        return new, after

    return guarded


def by_path(tree: Any) -> Arrays:
    """The arrays of a tree by path, such as `"block/conv/kernel"`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def in_tree(arrays: Mapping[str, Any], like: Any) -> Any:
    """The tree with the structure of `like` and the arrays of `by_path`."""
    return jax.tree.unflatten(
        jax.tree.structure(like), [arrays[path] for path in by_path(like)]
    )


def world_size(axis: str) -> int:
    """How many devices exchange."""
    return jax.lax.axis_size(axis)
