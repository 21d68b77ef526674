"""Arrays of a network by their paths: names, and copies between networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

Variables = dict[str, Any]


def matching(variables: Variables, source: Variables) -> dict[str, bool]:
    """Which arrays of a network another one has under the same path and shape.

    Args:
      variables: of the network, concrete or abstract.
      source: of the other one.

    Returns:
      For each path in `variables`, whether `source` has such an array.
    """
    shapes = {path_name(path): x.shape for path, x in jax.tree.leaves_with_path(source)}
    return {
        path_name(path): shapes.get(path_name(path)) == x.shape
        for path, x in jax.tree.leaves_with_path(variables)
    }


def started_from(variables: Variables, source: Variables) -> Variables:
    """The variables, with every array that matches one of `source` taken from there."""
    values = {path_name(path): x for path, x in jax.tree.leaves_with_path(source)}
    taken = matching(variables, source)

    def pick(path: Any, own: jax.Array) -> jax.Array:
        name = path_name(path)
        return values[name] if taken[name] else own

    return jax.tree.map_with_path(pick, variables)


def path_name(path: Sequence[Any]) -> str:
    """The path of a leaf as `"params/trunk/stage1_block1/conv1/kernel"`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
