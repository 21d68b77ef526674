"""Names to methods, and weighted sums of named methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxkd.distill.method import Method, Weight, compose
from jaxkd.registry import Registry, nearest

_REGISTRY = Registry("method", "jaxkd.distill")

register = _REGISTRY.register


def create(name: str, /, **options: Any) -> Method:
    """Makes the method `name`.

    Args:
      name: one of `names()`, or `"package.module:function"` for a factory of your
        own.
      **options: of the method's factory.

    Raises:
      KeyError: no such method; the message gives the nearest one.
      TypeError: an option that the method does not take, or of a wrong type.
      ValueError: an impossible value.

    >>> sorted(create("hlfd").weights)
    ['flfd', 'plfd']
    """
    method = _REGISTRY.create(name, **options)
    if not isinstance(method, Method):
        raise TypeError(
            f"{name!r} must return a jaxkd.distill.Method, got {type(method).__name__}"
        )
    return method


def factory(name: str) -> Callable[..., Method]:
    """The function that makes the method `name`; its docstring is the method's page.

    Raises:
      KeyError: no such method.
    """
    return _REGISTRY.get(name)


def names() -> list[str]:
    """The names of all methods, sorted."""
    return _REGISTRY.names()


def weighted(weights: Mapping[str, Weight], /, **options: Mapping[str, Any]) -> Method:
    """Makes the weighted sum of several methods.

    A part is the method of its name, unless its options hold `name`: this way one
    method takes part twice. Its weight multiplies those that the method itself has.

    Args:
      weights: factor per part: a number, or a schedule (a function of the step).
      **options: options per part.

    Raises:
      KeyError: no such method.
      TypeError: an option that a method does not take, or of a wrong type.
      ValueError: no parts, options for a part that is not there, a negative or
        non-finite weight, or an impossible option.

    >>> sorted(weighted({"ce": 0.1, "kd": 0.9}, kd=dict(temperature=2.0)).weights)
    ['ce', 'kd']
    >>> two = weighted(
    ...     {"soft": 0.5, "softer": 0.5},
    ...     soft=dict(name="kd", temperature=2.0),
    ...     softer=dict(name="kd", temperature=8.0),
    ... )
    >>> sorted(two.weights)
    ['soft/kd', 'softer/kd']
    """
    for part in options:
        if part not in weights:
            raise ValueError(
                f"options given for {part!r}, which is no part of the method; "
                f"{nearest(part, weights)}"
            )
    methods = {}
    for part, weight in weights.items():
        if not callable(weight) and not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"weight of {part!r} must be a finite number >= 0, got {weight}"
            )
        part_options = dict(options.get(part, {}))
        methods[part] = create(part_options.pop("name", part), **part_options)
    return compose(methods, weights)
