"""Networks by name: `create("resnet8x4", num_classes=100)`.

Every factory takes the keyword options `num_classes`, `width_factor` (all widths are
multiplied by it), `dtype` (of the computation; parameters and logits are float32) and
`remat` (what the backward pass recomputes, see `jaxkd.layers.Remat`), and returns a
Linen module called as `module(images, train=False) -> Outputs`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from jaxkd.registry import Registry

_NETWORKS = Registry("network", "jaxkd.models")

register = _NETWORKS.register


def create(name: str, /, **options: Any) -> nn.Module:
    """Builds the network `name`.

    Raises:
      KeyError: no such network.
      TypeError: an option that the network does not take, or of a wrong type.
      ValueError: an impossible value.

    >>> create("resnet20", num_classes=10).num_classes
    10
    """
    return _NETWORKS.create(name, **options)


def names() -> list[str]:
    """All registered names, sorted."""
    return _NETWORKS.names()
