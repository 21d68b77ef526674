"""Layer rules: what calls of layers compute instead, without touching a network's file.

Within `using(rule, train=...)` every convolution, product and norm of the networks asks
the rule first:

    def rule(layer, compute, *args):
        if "/".join(layer.path) == "stage1_block1/conv1":
            return compute(*args) / 2
        return compute(*args)

A rule runs inside the layer, so it may give it parameters and layers of its own
(`layer.param(...)`, `nn.Dense(..., name=...)(x)`); their paths begin with the layer's.
`compute` is what the layer does otherwise, or the rule that was there before. Layers
that rules can see are `Conv`, `Dense` and `BatchNorm` of `jaxkd.layers`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn

Compute = Callable[..., Any]
Rule = Callable[..., Any]
"""`rule(layer, compute, *args) -> result`."""

_rules: contextvars.ContextVar[tuple[Rule, ...]] = contextvars.ContextVar(
    "layer_rules", default=()
)
_train: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "layer_rules_train", default=False
)

_listeners: contextvars.ContextVar[tuple[Callable[..., None], ...]] = (
    contextvars.ContextVar("layer_rules_listeners", default=())
)


@contextlib.contextmanager
def using(rule: Rule, *, train: bool) -> Iterator[None]:
    """Within it, layers obey the rule; of several the innermost is asked first.

    Args:
      rule: see the module.
      train: what `training()` says to rules whose layers do not know the mode.
    """
    rules, mode = _rules.set((*_rules.get(), rule)), _train.set(train)
    try:
        yield
    finally:
        _rules.reset(rules)
        _train.reset(mode)


def training() -> bool:
    """Whether the network that is being run is in training mode."""
    return _train.get()


def obey(layer: nn.Module, compute: Compute, *args: Any) -> Any:
    """What a layer returns: the rules' result, or its own without rules."""
    for rule in _rules.get():
        compute = functools.partial(rule, layer, compute)
    return compute(*args)


@contextlib.contextmanager
def listening(listener: Callable[..., None]) -> Iterator[None]:
    """Within it, `listener(kind, **facts)` hears of functions that are no layers.

    Max-pooling tells `tell("max_pool", window=..., shape=...)`, the shape being that of
    its result; rules that put a ReLU somewhere tell `tell("relu", shape=...)`.
    """
    listeners = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(listeners)


def tell(kind: str, **facts: Any) -> None:
    """Tells those who listen what is being computed."""
    for listener in _listeners.get():
        listener(kind, **facts)


def set_features(layer: Any, features: int) -> None:
    """Gives a `Conv` or `Dense` another number of outputs for this call.

    To be used by a rule before it computes.
    """
    # The layer was made for this call, so nobody else sees the change.
    object.__setattr__(layer, "features", features)
