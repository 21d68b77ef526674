"""What a network returns and what a method may know about a network.

Every network, whatever its family, is a function of variables and images that
returns `Outputs`. `NetworkSpec` holds the shapes of those outputs for one example;
methods choose their adapters from it before any array exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.struct
import jax

if TYPE_CHECKING:
    Leaf = jax.Array
else:
    # JAX rebuilds pytrees with shapes, shardings and other leaves in place of arrays;
    # run-time type checks must let them pass.
    Leaf = Any


@flax.struct.dataclass
class Outputs:
    """Logits and named feature maps of one forward pass.

    Attributes:
      logits: `[batch, classes]`, or `[batch, height, width, classes]` for dense tasks.
      taps: named feature maps in depth order, `[batch, height, width, channels]`,
        `[batch, tokens, channels]` or `[batch, channels]`. Under jit, taps that no
        loss reads cost nothing.
    """

    logits: Leaf
    taps: dict[str, Leaf]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """Shapes of a network's outputs for one example (no batch axis).

    Attributes:
      name: the network's name in the run, used in error messages.
      logits: `(classes,)` or `(height, width, classes)`.
      taps: shape per tap name, in depth order.
    """

    name: str
    logits: tuple[int, ...]
    taps: Mapping[str, tuple[int, ...]]

    @property
    def num_classes(self) -> int:
        """The number of logits per example or pixel."""
        return self.logits[-1]

    def tap(self, name: str) -> tuple[int, ...]:
        """Returns the shape of tap `name`.

        Raises:
          KeyError: the network has no such tap; the message lists those it has.
        """
        if name not in self.taps:
            raise KeyError(
                f"network {self.name!r} has no tap {name!r}; "
                f"it has {', '.join(self.taps) or 'none'}"
            )
        return self.taps[name]

    @classmethod
    def from_outputs(cls, name: str, outputs: Outputs) -> NetworkSpec:
        """Reads the shapes off concrete or abstract outputs of a batch."""
        return cls(
            name=name,
            logits=tuple(outputs.logits.shape[1:]),
            taps={k: tuple(v.shape[1:]) for k, v in outputs.taps.items()},
        )
