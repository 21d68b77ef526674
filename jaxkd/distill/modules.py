"""Linen modules inside methods: connectors, regressors, auxiliary heads.

A method is a pair of pure functions, a module is an object with variables. These two
functions join them: what the module trains goes to the method's params, its batch-norm
statistics go to the method's memory. Modules are called as blocks are, with their
inputs and then a Python bool `train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkd.distill.method import Memory, Params


def init_module(
    module: nn.Module, key: jax.Array, *shapes: Sequence[int]
) -> tuple[Params, Memory]:
    """Makes a module's variables.

    Args:
      module: called as `module(*inputs, train)`.
      key: random key.
      *shapes: the shape of one example of each input, without the batch axis.

    Returns:
      `(params, memory)`: the module's parameters and its other collections.
    """
    inputs = [jnp.zeros((1, *shape), jnp.float32) for shape in shapes]
    variables = dict(module.init(key, *inputs, False))
    return variables.pop("params", {}), variables


def apply_module(
    module: nn.Module, params: Params, memory: Memory, *inputs: jax.Array, train: bool
) -> tuple[Any, Memory]:
    """Runs a module.

    Args:
      module: as given to `init_module`.
      params: its parameters.
      memory: its other collections.
      *inputs: arrays with a batch axis.
      train: whether batch norms use and record the statistics of the batch.

    Returns:
      What the module returns, and its collections after the call.
    """
    variables = {"params": params, **memory}
    if not train:
        return module.apply(variables, *inputs, False), memory
    output, updated = module.apply(variables, *inputs, True, mutable=list(memory))
    return output, {**memory, **updated}
