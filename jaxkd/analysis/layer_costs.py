"""Costs of a network layer by layer, from its jaxpr: what is where, sparse and narrow.

A layer is a Linen module, by its path; what a module does itself, outside of its
submodules, counts under its own path. Operations are counted as in
`jaxkd.analysis.costs`. Masks and narrow numbers are taken into account where they are
given: a multiplication by a weight that is masked, and the storage of it, cost nothing
then. That is what an ideal machine would save, not what dense hardware does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.analysis.costs import count_equation, is_literal, open_jaxpr, sub_jaxprs

_PRODUCTS = ("dot_general", "conv_general_dilated")


@dataclasses.dataclass(kw_only=True)
class LayerCosts:
    """What a layer costs.

    Attributes:
      path: of the module, `""` for the network itself.
      params: its parameters.
      macs: its multiply-accumulates.
      density: share of its parameters that take part, 1 without masks.
      weight_bits: of a parameter.
      activation_bits: of what goes into its products.
      activation_bytes: of what it hands on to others.
      peak_bytes: the largest sum of live activations while it runs. Elementwise results
        take the place of an operand that is not needed any more.
    """

    path: str
    params: int = 0
    macs: int = 0
    density: float = 1.0
    weight_bits: float = 32.0
    activation_bits: float = 32.0
    activation_bytes: int = 0
    peak_bytes: int = 0

    @property
    def effective_macs(self) -> float:
        """Multiply-accumulates with weights that take part."""
        return self.macs * self.density

    @property
    def bytes(self) -> float:
        """Bytes of the weights that take part; where they are is not counted."""
        return self.params * self.density * self.weight_bits / 8

    @property
    def bops(self) -> float:
        """Bit operations: effective multiply-accumulates times both widths."""
        return self.effective_macs * self.weight_bits * self.activation_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkCosts:
    """Costs of all layers, in the order in which they run.

    Attributes:
      layers: each of them.
    """

    layers: tuple[LayerCosts, ...]

    def total(self, name: str) -> float:
        """The sum of a cost over the layers; of `peak_bytes` the largest."""
        values = [getattr(layer, name) for layer in self.layers]
        return max(values, default=0) if name == "peak_bytes" else sum(values)

    @property
    def density(self) -> float:
        """Share of all parameters that take part."""
        params = self.total("params")
        kept = sum(layer.params * layer.density for layer in self.layers)
        return kept / params if params else 1.0


def layer_costs(
    apply: Callable[[Any, jax.Array], Any],
    variables: Mapping[str, Any],
    images: Any,
    *,
    densities: Mapping[str, float] | None = None,
    weight_bits: Mapping[str, float] | float = 32.0,
    activation_bits: Mapping[str, float] | float = 32.0,
) -> NetworkCosts:
    """Costs of a network by layer.

    Args:
      apply: `apply(variables, images)`; its results are what is read.
      variables: with `"params"`, abstract or concrete.
      images: the batch, abstract or concrete.
      densities: share of the numbers that take part, by path of a parameter.
      weight_bits: of parameters, by the path of a layer, or of all.
      activation_bits: of what goes into products, likewise.

    Returns:
      Costs of the layers that compute or hold something.

    Raises:
      ValueError: matrix products in a `while` loop, whose number of rounds is unknown.

    >>> import flax.linen as nn
    >>> dense, x = nn.Dense(5), jnp.zeros((2, 3))
    >>> costs = layer_costs(dense.apply, dense.init(jax.random.key(0), x), x)
    >>> costs.total("params"), costs.total("macs")
    (20, 30)
    """
    closed = jax.make_jaxpr(apply)(variables, images)
    walk = _Walk()
    walk.run(closed.jaxpr, "")
    layers = walk.layers
    for path, leaf in _leaves(variables["params"]):
        layer = layers.setdefault(path, LayerCosts(path=path))
        layer.params += math.prod(leaf.shape)
    if densities:
        _set_densities(layers, variables["params"], densities)
    for path, layer in layers.items():
        layer.weight_bits = _of(weight_bits, path)
        layer.activation_bits = _of(activation_bits, path)
    kept = [x for x in layers.values() if x.params or x.macs or x.activation_bytes]
    return NetworkCosts(layers=tuple(kept))


def xla_flops(function: Callable[..., Any], *args: Any) -> float | None:
    """What XLA's own analysis counts for a compiled function; None where it does not.

    It counts all arithmetic, that of norms and activations included, of the program as
    optimised for this machine.
    """
    compiled = jax.jit(function).lower(*args).compile()
    analysis: Any = compiled.cost_analysis()
    if isinstance(analysis, Sequence):
        analysis = analysis[0] if analysis else None
    return None if not analysis else float(analysis.get("flops", math.nan))


def layer_of(name_stack: str) -> str:
    """The path of the module that an equation belongs to.

    Linen puts the class of the outermost module, every module's name, and the names of
    its methods on the stack.

    >>> layer_of("ResNet/trunk/trunk._stem/stem/stem")
    'trunk/stem'
    """
    parts: list[str] = []
    for part in name_stack.split("/")[1:]:
        if "." not in part and (not parts or parts[-1] != part):
            parts.append(part)
    return "/".join(parts)


@dataclasses.dataclass(eq=False)
class _Made:
    """An array, whatever variables stand for it.

    Attributes:
      path: of the layer that made it.
      counted: whether it was counted as handed on.
    """

    path: str
    counted: bool = False


class _Walk:
    """Goes through a jaxpr: who computes what, and what is alive meanwhile."""

    def __init__(self):
        self.layers: dict[str, LayerCosts] = {}

    def run(
        self,
        jaxpr: Any,
        outside: str,
        alive: int = 0,
        given: Mapping[Any, _Made] | None = None,
    ) -> int:
        """Takes the equations of a jaxpr, and returns the peak of its live arrays.

        Args:
          jaxpr: the jaxpr.
          outside: the name stack of the equation that it belongs to.
          alive: bytes that live when it begins.
          given: those of its arguments that nobody needs afterwards.
        """
        last, arrays, peak = _last_uses(jaxpr), dict(given or {}), alive
        for i, equation in enumerate(jaxpr.eqns):
            stack = "/".join(s for s in (outside, _stack(equation)) if s)
            path = layer_of(stack)
            made = sum(_bytes(var.aval) for var in equation.outvars)
            dying = {v for v in _read(equation) if last.get(v) == i and v in arrays}
            here = self._inside(equation, stack, alive, dying, arrays)
            layer = self.layers.setdefault(path, LayerCosts(path=path))
            if here is None:
                here = alive + made
                if equation.primitive.name not in _PRODUCTS:
                    place = max((_bytes(v.aval) for v in dying), default=0)
                    here -= min(place, made)
                layer.macs += count_equation(equation)
            layer.peak_bytes = max(layer.peak_bytes, here)
            peak = max(peak, here)
            for var in _read(equation):
                self._hand_on(var, path, arrays)
            arrays.update((var, _Made(path)) for var in equation.outvars)
            unused = [v for v in equation.outvars if v not in last]
            alive += made - sum(_bytes(v.aval) for v in (*dying, *unused))
        caller = layer_of(outside) if outside else None
        for var in jaxpr.outvars:
            if not is_literal(var):
                self._hand_on(var, caller, arrays)
        return peak

    def _inside(
        self,
        equation: Any,
        stack: str,
        alive: int,
        dying: set[Any],
        arrays: Mapping[Any, _Made],
    ) -> int | None:
        """The peak within a called function that is run once; else None."""
        bodies = [open_jaxpr(body) for body in sub_jaxprs(equation.params)]
        if equation.primitive.name in ("scan", "while", "cond") or len(bodies) != 1:
            return None
        given = {}
        if len(bodies[0].invars) == len(equation.invars):
            # A literal is no variable, and cannot be looked up.
            given = {
                own: arrays[var]
                for own, var in zip(bodies[0].invars, equation.invars, strict=True)
                if not is_literal(var) and var in dying
            }
        return self.run(bodies[0], stack, alive, given)

    def _hand_on(self, var: Any, path: str | None, arrays: Mapping[Any, _Made]) -> None:
        """Counts an array once, when another layer reads it."""
        array = arrays.get(var)
        if array is not None and array.path != path and not array.counted:
            array.counted = True
            self.layers[array.path].activation_bytes += _bytes(var.aval)


def _last_uses(jaxpr: Any) -> dict[Any, int]:
    last = {v: i for i, e in enumerate(jaxpr.eqns) for v in _read(e)}
    end = len(jaxpr.eqns)
    return {**last, **{v: end for v in jaxpr.outvars if not is_literal(v)}}


def _read(equation: Any) -> list[Any]:
    return [var for var in equation.invars if not is_literal(var)]


def _bytes(aval: Any) -> int:
    shape = getattr(aval, "shape", ())
    dtype = getattr(aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 0)


def _stack(equation: Any) -> str:
    return str(equation.source_info.name_stack)


def _leaves(params: Any) -> list[tuple[str, Any]]:
    """The path of the layer of every parameter, and the parameter."""
    found = []
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found.append((name.rpartition("/")[0], leaf))
    return found


def _set_densities(
    layers: Mapping[str, LayerCosts], params: Any, densities: Mapping[str, float]
) -> None:
    """Densities of layers from those of their parameters.

    That of products is the density of the kernel; biases hardly count.
    """
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): math.prod(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    unknown = sorted(set(densities) - set(sizes))
    if unknown:
        raise ValueError(
            f"a density is given for {unknown[0]!r}, which is no parameter"
        )
    for path, layer in layers.items():
        own = {n: s for n, s in sizes.items() if n.rpartition("/")[0] == path}
        if own:
            kept = sum(size * densities.get(name, 1.0) for name, size in own.items())
            layer.density = kept / sum(own.values())


def _of(values: Mapping[str, float] | float, path: str) -> float:
    if isinstance(values, Mapping):
        return float(values.get(path, 32.0))
    return float(values)


def mask_densities(masks: Any) -> dict[str, float]:
    """The share of set numbers of every mask in a tree, by path; scalars are left out.

    Args:
      masks: bool arrays in the structure of the parameters.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(jnp.mean(mask))
        for path, mask in jax.tree.leaves_with_path(masks)
        if mask.ndim
    }
