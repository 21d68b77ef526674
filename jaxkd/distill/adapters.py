"""Matching a student's tap to a teacher's, whatever their families.

`adapter` reads the two shapes and picks what leads from one to the other:

    vector -> vector      a dense layer if the channels differ
    map    -> map         average pooling or bilinear resizing, and a 1x1 convolution
    tokens -> map, map -> tokens, tokens -> tokens
                          class tokens are dropped, the others laid on their square
                          grid; then as maps

Other pairs have no right answer and are errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxkd.layers import NetworkSpec, bias_uniform, fan_in_uniform
from jaxkd.layers.connectors import shrink_to, token_grid, tokens_to_map
from jaxkd.numerics import resize_bilinear

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """How two taps become comparable.

    Attributes:
      module: called as `module(student_tap, train)`; it may have no parameters.
      target: applied to the teacher's tap.
      shape: shape of one example of either result.
    """

    module: nn.Module
    target: Callable[[jax.Array], jax.Array]
    shape: Shape


class Match(nn.Module):
    """Brings features to a shape.

    Maps are average-pooled where they exceed the size, then go through the learned
    layer, then are enlarged bilinearly where they fall short of it. This order is the
    cheapest; a 1x1 convolution commutes with both.

    Attributes:
      shape: `(channels,)`, `(tokens, channels)` or `(height, width, channels)`.
      always_project: whether to learn a layer even if the channels agree.
    """

    shape: Shape
    always_project: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *features"], train: bool
    ) -> Float[Array, "b *new_features"]:
        """Maps `[b, ...]` to `[b, *shape]`."""
        del train
        if len(self.shape) == 3 and x.ndim == 3:
            x = tokens_to_map(x)
        if len(self.shape) == 3:
            x = shrink_to(x, self.shape[:2])
        if self.always_project or x.shape[-1] != self.shape[-1]:
            x = nn.Dense(
                self.shape[-1],
                kernel_init=fan_in_uniform,
                bias_init=bias_uniform(x.shape[-1]),
                dtype=x.dtype,
                name="project",
            )(x)
        if len(self.shape) == 3:
            x = resize_bilinear(x, self.shape[:2])
        return x


def adapter(
    student: NetworkSpec,
    student_tap: str,
    teacher: NetworkSpec,
    teacher_tap: str,
    *,
    always_project: bool = False,
) -> Adapter:
    """Chooses what makes two taps comparable, in the shape of the teacher's.

    Args:
      student: the student's spec.
      student_tap: name of its tap.
      teacher: the teacher's spec.
      teacher_tap: name of its tap.
      always_project: whether to learn a layer even if the channels agree.

    Returns:
      An adapter.

    Raises:
      KeyError: a network has no such tap.
      ValueError: the taps have no common form; the message names them, their networks
        and their shapes.
    """
    source, goal = student.tap(student_tap), teacher.tap(teacher_tap)

    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"tap {student_tap!r} of network {student.name!r} has shape {source} and "
            f"tap {teacher_tap!r} of network {teacher.name!r} has {goal}: {reason}"
        )

    for shape in (source, goal):
        if len(shape) not in (1, 2, 3):
            raise refuse("only vectors, tokens and maps can be matched")
    if (len(source) == 1) != (len(goal) == 1):
        raise refuse("a vector has no place in a map or sequence; choose other taps")

    def made(shape: Shape, target: Callable[[Any], Any]) -> Adapter:
        module = Match(shape, always_project)
        return Adapter(module=module, target=target, shape=shape)

    if len(goal) == 1:
        return made(goal, _as_it_is)
    source_map, goal_map = _as_map(source), _as_map(goal)
    if source_map is not None and goal_map is not None:
        return made(goal_map, tokens_to_map if len(goal) == 2 else _as_it_is)
    if len(source) == len(goal) == 2 and source[0] == goal[0]:
        return made(goal, _as_it_is)
    raise refuse("the tokens are no square grid after 0 to 2 class tokens")


def _as_it_is(x: jax.Array) -> jax.Array:
    return x


def _as_map(shape: Shape) -> Shape | None:
    """The shape as a map, or None for tokens that form no square."""
    if len(shape) == 3:
        return shape
    grid = token_grid(shape[0])
    return None if grid is None else (grid[1], grid[1], shape[1])
