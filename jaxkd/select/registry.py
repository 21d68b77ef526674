"""Selections by name: `create("hard_batches", delta=0.5)`."""

from __future__ import annotations

from typing import Any

from jaxkd.registry import Registry
from jaxkd.select.selection import Selection

_REGISTRY = Registry("selection", "jaxkd.select")

register = _REGISTRY.register
names = _REGISTRY.names


def create(name: str, /, **options: Any) -> Selection:
    """Makes the selection `name`.

    Args:
      name: one of `names()`, or `"package.module:function"` for one of your own.
      **options: of its factory.

    Raises:
      KeyError: no such selection; the message gives the nearest one.
      TypeError: an option that it does not take, or of a wrong type.
      ValueError: an impossible value.

    >>> create("ohem", keep=0.25).pick is None
    True
    """
    made = _REGISTRY.create(name, **options)
    if not isinstance(made, Selection):
        raise TypeError(
            f"{name!r} must return a jaxkd.select.Selection, got {type(made).__name__}"
        )
    return made
