"""The state of a training stage: one tree with everything a checkpoint must hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct

from jaxkd.layers.outputs import Leaf


@flax.struct.dataclass
class TrainState:
    """All that changes during a stage, apart from the data iterator.

    Attributes:
      step: optimiser steps done, int32.
      key: the stage's random key; step `i` draws from `fold_in(key, i)`.
      params: `{"network": ..., "method": ...}`, float32.
      collections: the network's other variables (batch-norm statistics).
      opt_state: the optimiser's state.
      memory: what the method remembers (banks, fixed projections).
      average: running average of the network's params and collections, or None.
      selection: what the selection of records remembers.
    """

    step: Leaf
    key: Leaf
    params: Any
    collections: Any
    opt_state: Any
    memory: Any
    average: Any
    selection: Any = dataclasses.field(default_factory=dict)

    def variables(self) -> dict[str, Any]:
        """The network's variables as they are trained."""
        return {"params": self.params["network"], **self.collections}
