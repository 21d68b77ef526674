"""Analytic costs of a network: parameters and multiply-accumulate operations.

The counter reads the jaxpr of a function, so it sees what the function asks for and
not what a compiler makes of it. Only matrix products and convolutions count, as in
published tables; additions, activations, normalisation and interpolation do not.
Padding counts as if it were multiplied, zeros inserted by a dilated input do not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What a network costs.

    Attributes:
      macs: multiply-accumulate operations; one is two floating-point operations.
      params: trainable numbers; None if a bare function was counted.
    """

    macs: int
    params: int | None = None


def count_costs(function: Callable[..., Any], *abstract_args: Any) -> Costs:
    """Counts the multiply-accumulates that the results of a function depend on.

    Operations whose results reach no output are not counted. The costlier branch of a
    `cond` counts, of `platform_dependent` functions the default one, and a `scan`
    counts its body as often as it runs.

    Args:
      function: any function that JAX can trace; return only what is to be read.
      *abstract_args: arrays or `jax.ShapeDtypeStruct`s to trace it with.

    Returns:
      `Costs` with `macs`.

    Raises:
      ValueError: matrix products in a `while` loop, whose number of rounds is unknown.

    >>> x, kernel = jnp.zeros((2, 3)), jnp.zeros((3, 5))
    >>> count_costs(jnp.dot, x, kernel).macs
    30
    """
    return count_jaxpr(jax.make_jaxpr(function)(*abstract_args))


def count_jaxpr(closed: Any) -> Costs:
    """As `count_costs`, of a function that is traced already.

    Args:
      closed: a closed jaxpr.

    Raises:
      ValueError: matrix products in a `while` loop, whose number of rounds is unknown.
    """
    macs, _ = _count(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return Costs(macs=macs)


def network_costs(
    module: nn.Module, input_shape: Sequence[int], *, reads: Sequence[str] = ()
) -> Costs:
    """Parameters and multiply-accumulates of a network for one image in evaluation.

    Args:
      module: a network of `jaxkd.models`.
      input_shape: `(height, width, channels)` of the image.
      reads: names of the taps that are read besides the logits.

    Returns:
      `Costs` with both fields.

    Raises:
      KeyError: the network has no tap of a name in `reads`.

    >>> from jaxkd import models
    >>> network_costs(models.create("resnet8", num_classes=10), (32, 32, 3)).params
    78042
    """
    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)

    def read(variables: Any, images: jax.Array) -> list[jax.Array]:
        outputs: Any = module.apply(variables, images)
        unknown = [name for name in reads if name not in outputs.taps]
        if unknown:
            raise KeyError(
                f"the network has no tap {unknown[0]!r}; it has "
                + ", ".join(outputs.taps)
            )
        return [outputs.logits, *(outputs.taps[name] for name in reads)]

    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    return Costs(macs=count_costs(read, variables, images).macs, params=params)


def _count(jaxpr: Any, live_outputs: Sequence[bool]) -> tuple[int, list[bool]]:
    """The operations behind the live outputs, and which inputs they read.

    Walks the equations backwards and skips those whose results nobody reads.
    """
    live = {
        var
        for var, wanted in zip(jaxpr.outvars, live_outputs, strict=True)
        if wanted and not is_literal(var)
    }
    macs = 0
    for equation in reversed(jaxpr.eqns):
        wanted = [var in live for var in equation.outvars]
        if not any(wanted) and not equation.effects:
            continue
        more, reads = _count_equation(equation, wanted)
        macs += more
        live.update(
            var
            for var, read in zip(equation.invars, reads, strict=True)
            if read and not is_literal(var)
        )
    return macs, [var in live for var in jaxpr.invars]


def _count_equation(equation: Any, wanted: list[bool]) -> tuple[int, list[bool]]:
    """The operations of one equation, and which of its inputs they read."""
    everything = [True] * len(equation.invars)
    name = equation.primitive.name
    if name == "dot_general":
        return _dot_macs(equation), everything
    if name == "conv_general_dilated":
        return _convolution_macs(equation), everything
    bodies = [open_jaxpr(body) for body in sub_jaxprs(equation.params)]
    if not bodies:
        return 0, everything
    if name == "scan":
        # Every output may feed the next round, so nothing is skipped in the body.
        return equation.params["length"] * _count_all(bodies[0]), everything
    if name == "while":
        if any(_count_all(body) for body in bodies):
            raise ValueError(
                "cannot count the matrix products of a while loop; use jax.lax.scan "
                "or a fori_loop with static bounds"
            )
        return 0, everything
    if name == "cond":
        # What a program does on one platform in a way of its own is counted as what it
        # does on the others.
        platforms = equation.params.get("branches_platforms") or ()
        if None in platforms:
            bodies = [bodies[platforms.index(None)]]
        return max(_count(body, wanted)[0] for body in bodies), everything
    body = bodies[0]
    same_inputs = len(body.invars) == len(everything)
    if len(bodies) == 1 and same_inputs and len(body.outvars) == len(wanted):
        return _count(body, wanted)  # jit, remat, custom derivatives, shard_map
    return sum(_count_all(body) for body in bodies), everything


def count_equation(equation: Any) -> int:
    """The multiply-accumulates of one equation, whatever of its results is read."""
    return _count_equation(equation, [True] * len(equation.outvars))[0]


def _count_all(jaxpr: Any) -> int:
    return _count(jaxpr, [True] * len(jaxpr.outvars))[0]


def is_literal(atom: Any) -> bool:
    """Whether an operand of a jaxpr is a number and no variable."""
    return hasattr(atom, "val")


def open_jaxpr(jaxpr: Any) -> Any:
    """The jaxpr in a closed one, or itself."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def sub_jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(open_jaxpr(item), "eqns"):
                found.append(item)
    return found


def _dot_macs(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    result = equation.outvars[0].aval.shape
    return math.prod(result) * math.prod(left[axis] for axis in contracted)


def _convolution_macs(equation: Any) -> int:
    """Result size x input channels of a group x pairs of output and kernel pixel."""
    params = equation.params
    numbers = params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    result = equation.outvars[0].aval.shape
    macs = result[numbers.out_spec[0]] * result[numbers.out_spec[1]]
    macs *= kernel[numbers.rhs_spec[1]]
    spatial = zip(
        numbers.out_spec[2:],
        numbers.rhs_spec[2:],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    )
    for out_axis, kernel_axis, stride, (low, _), spread, gap in spatial:
        starts = np.arange(result[out_axis]) * stride - low
        pixels = starts[:, None] + np.arange(kernel[kernel_axis]) * gap
        macs *= int((pixels % spread == 0).sum())
    return macs


if __name__ == "__main__":
    import sys

    from jaxkd.training.cost_table import main

    sys.exit(main())
