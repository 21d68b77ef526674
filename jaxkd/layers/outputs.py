"""What a network returns and what a method may know about a network.

Every network, whatever its family, is a function of variables and images that
returns `Outputs`. `NetworkSpec` holds the shapes of those outputs for one example;
methods choose their adapters from it before any array exists.
"""

from __future__ import annotations

import dataclasses
import re
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
      head: the last linear layer, `{"kernel": [channels, classes], "bias":
        [classes]}`, such that `logits = taps["pooled"] @ kernel + bias`; None if the
        network has no such layer.
      norms: per tap that is the output of a batch norm (before its ReLU), that norm's
        `{"scale": [channels], "bias": [channels]}`;
        in a residual network the last one before the addition.
      views: outputs for other views of the same records, by the view's name; filled
        in by the train step for methods that ask for views.
      peers: outputs of the other students that learn in the same stage.
    """

    logits: Leaf
    taps: dict[str, Leaf]
    head: Any = None
    norms: dict[str, Any] = flax.struct.field(default_factory=dict)
    views: dict[str, Any] = flax.struct.field(default_factory=dict)
    peers: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """Shapes of a network's outputs for one example (no batch axis).

    Attributes:
      name: the network's name in the run, used in error messages.
      logits: `(classes,)` or `(height, width, classes)`.
      taps: shape per tap name, in depth order.
      has_head: whether the outputs hold the last linear layer.
      norms: the taps whose batch norm the outputs hold.
      peers: the other students of the stage.
    """

    name: str
    logits: tuple[int, ...]
    taps: Mapping[str, tuple[int, ...]]
    has_head: bool = False
    norms: tuple[str, ...] = ()
    peers: tuple[NetworkSpec, ...] = ()

    @property
    def num_classes(self) -> int:
        """The number of logits per example or pixel."""
        return self.logits[-1]

    @property
    def stages(self) -> tuple[str, ...]:
        """The taps at the end of the network's stages, in depth order.

        These are the taps called "stage1", "stage2", ..., which every classifier of
        `jaxkd.models` has; empty for a network that names its taps otherwise.
        """
        return tuple(name for name in self.taps if re.fullmatch(r"stage\d+", name))

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
            has_head=outputs.head is not None,
            norms=tuple(outputs.norms),
            peers=tuple(
                cls.from_outputs(f"{name}.peer{i}", peer)
                for i, peer in enumerate(outputs.peers, start=1)
            ),
        )
