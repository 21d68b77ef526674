"""Networks as the loop sees them: functions of variables, never modules.

Any function that keeps the contract of `ApplyFn` can be a teacher or a student; Linen
modules are wrapped by `from_linen`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkd.layers import NetworkSpec, Outputs

Variables = dict[str, Any]


@runtime_checkable
class ApplyFn(Protocol):
    """`apply(variables, images, *, train, key) -> (outputs, collections)`.

    `collections` are the variables other than `"params"`, updated when `train`.
    `key` is for dropout and the like; None in evaluation.
    """

    def __call__(
        self,
        variables: Variables,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None,
    ) -> tuple[Outputs, Variables]:
        """Runs the network."""
        ...


@dataclasses.dataclass(frozen=True)
class Network:
    """A network: `init(key) -> variables`, its `apply`, and the shapes it returns."""

    name: str
    init: Callable[[jax.Array], Variables]
    apply: ApplyFn
    spec: NetworkSpec


def from_linen(name: str, module: nn.Module, input_shape: Sequence[int]) -> Network:
    """Wraps a Linen module called as `module(images, train=...) -> Outputs`.

    Args:
      name: the network's name in the run.
      module: the module.
      input_shape: `(height, width, channels)` of the images.

    Returns:
      The network; its spec comes from abstract evaluation, no array is made.
    """

    def init(key: jax.Array) -> Variables:
        images = jnp.zeros((1, *input_shape), jnp.float32)
        return dict(module.init(key, images, train=False))

    def apply(
        variables: Variables,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None,
    ) -> tuple[Outputs, Variables]:
        collections = {k: v for k, v in variables.items() if k != "params"}
        rngs = None if key is None else {"dropout": key}
        if not train:
            outputs = module.apply(variables, images, train=False, rngs=rngs)
            return _outputs(outputs, name), collections
        outputs, updated = module.apply(
            variables, images, train=True, rngs=rngs, mutable=list(collections)
        )
        return _outputs(outputs, name), {**collections, **updated}

    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    variables = jax.eval_shape(init, jax.random.key(0))
    outputs, _ = jax.eval_shape(
        lambda v, x: apply(v, x, train=False, key=None), variables, images
    )
    return Network(name, init, apply, NetworkSpec.from_outputs(name, outputs))


def _outputs(value: Any, name: str) -> Outputs:
    if not isinstance(value, Outputs):
        raise TypeError(
            f"network {name!r} must return jaxkd.layers.Outputs(logits, taps), "
            f"got {type(value).__name__}"
        )
    return value
