"""What a network consists of: the calls of its layers, and what they cost.

A network is traced once, without making an array, and every call of a `Conv`, `Dense`
or `BatchNorm` is written down with its path and shapes. Who changes layers by their
paths (`jaxkd.sparsity.sift_layers`) reads here what the network would have done.

Operations are counted as in the published iso-FLOP tables, per module and for one
image, additions and multiplications apart: a convolution of n weights makes n - 1
additions and n multiplications per output pixel, a batch norm of N numbers in C
channels 2 C (N / C - 1) + 2 N additions, 3 N multiplications and C others, a max-pool
one comparison less than its window has pixels. Activations, sums, softmaxes and
products of two activations (attention) do not count.

Reference: Thangarasa et al., "Sparse-IFT", ICML 2024, and the authors' profiler.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkd.layers import BatchNorm, rules
from jaxkd.layers.convolution import Conv, plain_convolutions
from jaxkd.layers.dense import Dense

Shape = tuple[int, ...]
Kind = Literal["conv", "dense", "norm", "max_pool", "relu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a layer, for a batch of one.

    Attributes:
      path: of the layer, `"stage1_block1/conv1"`.
      kind: what it is.
      inputs: shape of its input.
      outputs: shape of its output.
      taps: pixels of the kernel; 1 of a dense layer.
      groups: of the convolution.
      bias: whether it adds one.
      heads: of the block of attention that it belongs to, else 1.
      window: side of a pooling window.
      parts: layers that are computed as this one, side by side.
      norm: path of the batch norm whose input is this very output; None if there is
        none.
    """

    path: str
    kind: Kind
    inputs: Shape
    outputs: Shape
    taps: int = 1
    groups: int = 1
    bias: bool = False
    heads: int = 1
    window: int = 1
    parts: int = 1
    norm: str | None = None

    @property
    def f_in(self) -> int:
        """Input channels."""
        return self.inputs[-1]

    @property
    def f_out(self) -> int:
        """Output channels."""
        return self.outputs[-1]

    @property
    def depthwise(self) -> bool:
        """Whether every input channel is a group of its own."""
        return self.kind == "conv" and self.groups == self.f_in > 1

    @property
    def weights(self) -> int:
        """Numbers in the kernel."""
        return self.taps * (self.f_in // self.groups) * self.f_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one forward pass.

    Attributes:
      adds: additions.
      multiplies: multiplications.
      other: divisions, roots and comparisons.
    """

    adds: int = 0
    multiplies: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.adds + self.multiplies + self.other

    def __add__(self, more: Flops) -> Flops:
        """The sum of two counts."""
        return Flops(
            adds=self.adds + more.adds,
            multiplies=self.multiplies + more.multiplies,
            other=self.other + more.other,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
    """What a network consists of.

    Attributes:
      calls: of its layers, in their order.
      blocks: of modules with a number `features` that are no such layers, by path:
        that number and their option `skip`, if any.
      params: the shape of every parameter, by path.
      logits: shape of the logits, or of what the module returns.
      taps: shapes of the taps, if the module returns `Outputs`.
      operations: how often which primitive operation occurs.
    """

    calls: tuple[Call, ...]
    blocks: Mapping[str, Mapping[str, Any]]
    params: Mapping[str, Shape]
    logits: Any
    taps: Mapping[str, Shape]
    operations: Mapping[str, int]

    def call(self, path: str) -> Call | None:
        """The call of the layer at a path, if it is called."""
        return next((call for call in self.calls if call.path == path), None)

    def flops(
        self,
        densities: Mapping[str, float] | None = None,
        *,
        average_pool: bool = False,
        kinds: Sequence[Kind] = ("conv", "dense", "norm", "max_pool", "relu"),
    ) -> Flops:
        """Counts the operations of one forward pass of one image.

        Args:
          densities: by the path of a kernel, the share of its numbers that take part.
            The additions and multiplications with it are scaled and rounded down.
          average_pool: whether the average over the last map counts, as it does where
            it is a module (the authors' ImageNet networks, not those for CIFAR).
          kinds: which layers count.
        """
        total = Flops()
        for call in self.calls:
            if call.kind in kinds:
                total += _flops(call, (densities or {}).get(f"{call.path}/kernel"))
        maps = [call.outputs for call in self.calls if len(call.outputs) == 4]
        if average_pool and maps:
            numbers, channels = math.prod(maps[-1]), maps[-1][-1]
            total += Flops(adds=numbers - channels, other=channels)
        return total

    def kernel_flops(self, path: str) -> int:
        """The operations that scale with the density of the kernel at a path."""
        call = self.call(path.removesuffix("/kernel"))
        if call is None:
            raise KeyError(f"no kernel {path!r}")
        return _flops(call, 1.0).total - _flops(call, 0.0).total


def _flops(call: Call, density: float | None) -> Flops:
    numbers, channels = math.prod(call.outputs), call.outputs[-1]
    if call.kind == "max_pool":
        return Flops(other=(call.window**2 - 1) * numbers)
    if call.kind == "relu":
        return Flops(other=numbers)
    if call.kind == "norm":
        per_channel = numbers // channels
        return Flops(
            adds=2 * channels * (per_channel - 1) + 2 * numbers,
            multiplies=3 * numbers,
            other=channels,
        )
    weights, pixels = call.weights // call.parts, numbers // channels
    multiplies = weights * pixels
    if call.kind == "conv":
        adds = (weights - 1) * pixels
    else:
        adds = (call.f_in - 1) * numbers // call.parts
    if density is not None:
        adds, multiplies = int(adds * density), int(multiplies * density)
    adds, multiplies = adds * call.parts, multiplies * call.parts
    return Flops(adds=adds + (numbers if call.bias else 0), multiplies=multiplies)


_reading: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "structure_reading", default=False
)


def reading() -> bool:
    """Whether a network is being read as it is, so that its layers must not change."""
    return _reading.get()


@contextlib.contextmanager
def _as_it_is(plain: bool) -> Iterator[None]:
    token = _reading.set(plain)
    try:
        yield
    finally:
        _reading.reset(token)


def read_structure(
    module: nn.Module,
    *args: Any,
    changed: bool = False,
    **kwargs: Any,
) -> Structure:
    """Traces a network for a batch of one and writes down what it consists of.

    Args:
      module: a Linen module.
      *args: what it is called with; the leading axis of arrays is the batch.
      changed: whether layers change as the rules of the caller's context have it;
        otherwise the network is read as it is (see `reading`).
      **kwargs: further, static, arguments of the call.

    Raises:
      ValueError: a layer that is called twice.
    """
    calls: dict[str, Call] = {}
    blocks: dict[str, dict[str, Any]] = {}
    # The arrays are kept: an identity is only good as long as its object lives.
    made: dict[int, tuple[str, Any]] = {}

    def write(layer: Any, compute: rules.Compute, *inputs: Any) -> Any:
        path = "/".join(layer.path)
        x, y = inputs[0], compute(*inputs)
        if isinstance(layer, BatchNorm):
            before = made.get(id(x))
            if before is not None and calls[before[0]].norm is None:
                calls[before[0]] = dataclasses.replace(calls[before[0]], norm=path)
            found = Call(path=path, kind="norm", inputs=x.shape, outputs=x.shape)
        else:
            conv = isinstance(layer, Conv)
            size = layer.kernel_size if conv else ()
            found = Call(
                path=path,
                kind="conv" if conv else "dense",
                inputs=x.shape,
                # What a rule makes of the output is its own matter.
                outputs=(*y.shape[:-1], layer.features),
                taps=math.prod([size] if isinstance(size, int) else size),
                groups=layer.feature_group_count if conv else 1,
                bias=layer.use_bias,
                heads=getattr(layer.parent, "heads", 1),
            )
            made[id(y)] = (path, y)
        if path in calls:
            raise ValueError(f"layer {path!r} is called twice; it cannot be replaced")
        calls[path] = found
        return y

    def heard(kind: Any, *, shape: Shape, window: int = 1) -> None:
        path = f"{kind} {len(calls)}"
        calls[path] = Call(
            path=path, kind=kind, inputs=shape, outputs=shape, window=window
        )

    def note(call: Any, inputs: Any, options: Any, context: Any) -> Any:
        block = context.module
        features = getattr(block, "features", None)
        if (
            context.method_name == "__call__"
            and isinstance(features, int)
            and not isinstance(block, Conv | Dense)
        ):
            path = "/".join(block.path)
            blocks.setdefault(path, {"features": features})
            if hasattr(block, "skip"):
                blocks[path].setdefault("skip", block.skip)
        return call(*inputs, **options)

    alone = module.clone(parent=None, name=None)
    static = [None if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else x
              for x in args]  # fmt: skip
    arrays = [
        jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
        for x in args
        if isinstance(x, jax.Array | jax.ShapeDtypeStruct)
    ]

    def run(*arrays: jax.Array) -> Any:
        left = iter(arrays)
        filled = [next(left) if x is None else x for x in static]
        key = jax.random.key(0)
        rngs = {"params": key, "dropout": key}
        return alone.init_with_output(rngs, *filled, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_it_is(not changed))
        stack.enter_context(plain_convolutions())
        stack.enter_context(nn.intercept_methods(note))
        stack.enter_context(rules.listening(heard))
        stack.enter_context(rules.using(write, train=False))
        jaxpr, (outputs, variables) = jax.make_jaxpr(run, return_shape=True)(*arrays)
    operations: collections.Counter[str] = collections.Counter()
    _count_operations(jaxpr.jaxpr, operations)
    returned = getattr(outputs, "logits", outputs)
    params = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(variables.get("params", {}))
    }
    return Structure(
        # A layer without a kernel stands aside for layers that a rule put below it.
        calls=tuple(
            call
            for call in calls.values()
            if call.kind not in ("conv", "dense") or f"{call.path}/kernel" in params
        ),
        blocks=blocks,
        params=params,
        logits=jax.tree.map(jnp.shape, returned),
        taps={k: x.shape for k, x in getattr(outputs, "taps", {}).items()},
        operations=dict(operations),
    )


def network_structure(module: nn.Module, input_shape: Sequence[int]) -> Structure:
    """What a network of `jaxkd.models` consists of.

    Args:
      module: the network.
      input_shape: `(height, width, channels)` of the images.

    >>> from jaxkd import models
    >>> network = models.create("resnet18", num_classes=100, stem="cifar")
    >>> network_structure(network, (32, 32, 3)).flops().total
    1115226800
    """
    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    return read_structure(module, images, train=False)


def _count_operations(jaxpr: Any, found: collections.Counter[str]) -> None:
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    _count_operations(inner, found)
