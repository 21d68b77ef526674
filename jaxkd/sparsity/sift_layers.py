"""Sparse iso-FLOP layers in the place of a network's own, by layer rules.

A `Sift` is the plan for one network: which layers are replaced by which family. It is
made from the structure of the dense network, and acts in a context in which the network
is run. Names of parameters, below the path of the layer that is
replaced:

    wide        kernel: the layer's own, with both widths grown
    parallel    kernel: the B kernels side by side along the outputs (within every group
                of a grouped convolution); the batch norm that follows has B times the
                channels and is summed over branches, a norm for each branch
    factorized  U/kernel (k x k, carries the stride), norm (its batch norm), V/kernel
                (1 x 1), V/bias
    doped       kernel and bias: the sparse layer; U/kernel and V/kernel beside it

A layer whose output no batch norm takes (a `Dense` of a transformer, the second
convolution of a pre-activated block) has a form without norms: parallel branches are
summed as they are, which is one linear layer again, with a mask that is the union of
theirs; between the factors stands at most a ReLU.

Kernels are drawn as the networks draw them, Kaiming-normal by fan-out in the residual
networks, for each branch alone and not rescaled for their zeros. Of the factors in the
place of a convolution both are drawn so; in the place of a product the first is drawn
as the layer was and the second keeps the variance of what it sees.

Reference: Thangarasa et al., "Sparse-IFT: Sparse Iso-FLOP Transformations for
Maximizing Training Efficiency", ICML 2024, and the authors' code.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkd.layers import BatchNorm, kaiming_normal, rules
from jaxkd.layers.convolution import Conv
from jaxkd.layers.dense import Dense
from jaxkd.sparsity import iso_flop
from jaxkd.sparsity.masks import is_head
from jaxkd.sparsity.structure import Call, Structure, read_structure, reading

Family = Literal["dense", "wide", "parallel", "factorized", "doped"]
UVLayer = Literal["linear", "nonlinear_norelu", "nonlinear_relu"]

# The layers below a factorized or doped one.
FACTORS = ("U", "V")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sift:
    """How the layers of one network are replaced.

    Attributes:
      family: what takes their place.
      sparsity: the share of zeros that sizes are computed for.
      dense: the network as it is.
      replaced: the calls of layers that are replaced, by path.
      base_width: the unit of widths of the wide family.
      uv_layer: what stands between the factors of the factorized family.
      branch_relu: whether every parallel branch ends with a ReLU (ImageNet networks).
      ranks: by patterns of paths, ranks in the place of the iso-FLOP ones.
    """

    family: Family
    sparsity: float
    dense: Structure
    replaced: Mapping[str, Call]
    base_width: int = 64
    uv_layer: UVLayer = "nonlinear_relu"
    branch_relu: bool = False
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def branches(self) -> int:
        """The number of parallel branches."""
        return iso_flop.branches(self.sparsity)

    def rank(self, call: Call) -> int:
        """The rank of the factors that stand for a layer or beside it."""
        for pattern, rank in self.ranks.items():
            if re.search(pattern, call.path):
                if rank % call.groups:
                    raise ValueError(
                        f"ranks: layer {call.path!r} has {call.groups} groups, which "
                        f"do not divide the rank {rank}"
                    )
                return rank
        sizes: Any = dict(sparsity=self.sparsity, taps=call.taps, groups=call.groups)
        if self.family == "doped":
            return iso_flop.doped_rank(call.f_in, call.f_out, **sizes)
        return iso_flop.factorized_rank(call.f_in, call.f_out, **sizes)

    def width(self, features: int) -> int:
        """A width of the wide network from one of the dense network."""
        return iso_flop.wide_features(
            features, sparsity=self.sparsity, base=self.base_width
        )

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """The context in which networks run that obey `replace` and `resize`."""
        token = _acting.set(self)
        try:
            yield
        finally:
            _acting.reset(token)


_acting: contextvars.ContextVar[Sift | None] = contextvars.ContextVar(
    "sift_layers_acting", default=None
)

_innermost: contextvars.ContextVar[object] = contextvars.ContextVar(
    "sift_layers_innermost", default=None
)


def base_width(structure: Structure) -> int:
    """The unit of a network's widths: that of its first layer, per attention head."""
    first = next((c for c in structure.calls if c.kind in ("conv", "dense")), None)
    heads = max((call.heads for call in structure.calls), default=1)
    if first is None:
        return 1
    return first.f_out // heads if first.f_out % heads == 0 else first.f_out


Planner = Callable[[nn.Module, Any, Any], Sift | None]
"""`plan(module, args, kwargs)`: what is to be done with a network; None: nothing."""


@contextlib.contextmanager
def replacing(plan: Planner, *, train: bool) -> Iterator[None]:
    """Within it, networks run with their layers replaced.

    Args:
      plan: is asked whenever a network is called.
      train: whether they run in training mode.
    """

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or reading():
            return call(*args, **kwargs)
        sift = _acting.get()
        if sift is None:
            if module.path:
                return call(*args, **kwargs)
            sift = plan(module, args, kwargs)
            if sift is None:
                return call(*args, **kwargs)
            with sift.acting():
                _resize(sift, module)
                return call(*args, **kwargs)
        _resize(sift, module)
        return call(*args, **kwargs)

    # Where contexts are nested, layers must not be replaced twice.
    innermost = object()

    def rule(layer: Any, compute: rules.Compute, *args: Any) -> Any:
        if _innermost.get() is not innermost:
            return compute(*args)
        return _rule(layer, compute, *args)

    token = _innermost.set(innermost)
    try:
        with nn.intercept_methods(interceptor), rules.using(rule, train=train):
            yield
    finally:
        _innermost.reset(token)


def apply_plan(sift: Sift, module: nn.Module, *args: Any, **kwargs: Any) -> Structure:
    """Traces a network with its layers replaced, and checks what comes of it.

    Args:
      sift: the plan.
      module: the network.
      *args: what it is called with.
      **kwargs: further, static, arguments.

    Returns:
      The structure of the network with its layers replaced.

    Raises:
      ValueError: a layer that the family cannot replace, or a network that would not
        compute the same with it.
    """
    with replacing(lambda *_: None, train=False), sift.acting():
        found = read_structure(module, *args, changed=True, **kwargs)
    dense = sift.dense
    if sift.family == "wide":
        # Networks compare widths to decide what to compute: the operations tell.
        extra = {c.path for c in found.calls} ^ {c.path for c in dense.calls}
        if extra or found.operations != dense.operations:
            where = f" at {min(extra)!r}" if extra else ""
            raise ValueError(
                f"family 'wide': the network computes something else{where} when its "
                "widths grow; take another family, or width_factor with 'dense'"
            )
        same = found.logits == dense.logits
    else:
        same = (found.logits, found.taps) == (dense.logits, dense.taps)
    if not same:
        changed = [k for k, x in found.taps.items() if x != dense.taps.get(k)]
        raise ValueError(
            f"family {sift.family!r}: the shape of "
            f"{changed[0] if changed else 'the logits'} changes, because more than a "
            "batch norm reads the output of a layer; take another family, or leave "
            "the layer dense by scope.dense"
        )
    if sift.family != "parallel":
        return found
    return dataclasses.replace(
        found,
        calls=tuple(
            dataclasses.replace(call, parts=sift.branches)
            if call.path in sift.replaced
            else call
            for call in found.calls
        ),
    )


def _rule(layer: Any, compute: rules.Compute, *args: Any) -> Any:
    sift = _acting.get()
    if sift is None or reading() or sift.family == "dense":
        return compute(*args)
    if isinstance(layer, BatchNorm):
        return _norm(sift, layer, compute, *args)
    if sift.family == "wide":
        return _wide(sift, layer, compute, args[0])
    call = sift.replaced.get("/".join(layer.path))
    if call is None:
        return compute(*args)
    replace = {"parallel": _parallel, "factorized": _factorized, "doped": _doped}
    return replace[sift.family](sift, call, layer, compute, args[0])


def _resize(sift: Sift, module: Any) -> None:
    """Gives a block of the wide network its width.

    Blocks compare their width with that of their input, so it must be right. A width
    that differs from the dense network's was computed from one that has grown.
    """
    if sift.family != "wide" or isinstance(module, Conv | Dense):
        return
    known = sift.dense.blocks.get("/".join(module.path))
    if known is None:
        return
    if module.features == known["features"]:
        rules.set_features(module, sift.width(known["features"]))
    if "skip" in known:
        object.__setattr__(module, "skip", known["skip"])


def _wide(sift: Sift, layer: Any, compute: rules.Compute, x: jax.Array) -> jax.Array:
    path = "/".join(layer.path)
    call = sift.dense.call(path)
    if call is None:
        raise ValueError(
            f"family 'wide': layer {path!r} is not in the dense network; its network "
            "compares widths, take another family"
        )
    if call.depthwise:
        object.__setattr__(layer, "feature_group_count", x.shape[-1])
        rules.set_features(layer, x.shape[-1] * (call.f_out // call.f_in))
        return compute(x)
    if layer.features == call.f_out and not is_head(path):
        rules.set_features(layer, sift.width(call.f_out))
    if call.groups > 1 and (x.shape[-1] % call.groups or layer.features % call.groups):
        raise ValueError(
            f"family 'wide': layer {path!r} would have {x.shape[-1]} to "
            f"{layer.features} channels, which its {call.groups} groups do not divide; "
            "set base_width to a multiple of them or take another sparsity"
        )
    if layer.features % call.heads and not is_head(path):
        raise ValueError(
            f"family 'wide': layer {path!r} would have {layer.features} features, "
            f"which its {call.heads} heads do not divide; leave base_width out"
        )
    return compute(x)


def _parallel(
    sift: Sift, call: Call, layer: Any, compute: rules.Compute, x: jax.Array
) -> jax.Array:
    count, groups = sift.branches, call.groups
    own = layer.kernel_init

    def branchwise(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        """Draws every branch alone, as its fan-out is that of one branch."""
        one = (*shape[:-1], shape[-1] // count)
        drawn = jnp.stack([own(k, one, dtype) for k in jax.random.split(key, count)])
        # [count, ..., groups, f] -> [..., groups, count, f]
        drawn = drawn.reshape(*drawn.shape[:-1], groups, -1)
        return jnp.moveaxis(drawn, 0, -2).reshape(shape)

    object.__setattr__(layer, "kernel_init", branchwise)
    rules.set_features(layer, count * call.f_out)
    y = compute(x)
    return y if call.norm else sum_branches(y, count, groups)


def _norm(
    sift: Sift, layer: Any, compute: rules.Compute, x: jax.Array, train: bool
) -> jax.Array:
    y = compute(x, train)
    if sift.family != "parallel":
        return y
    path = "/".join(layer.path)
    call = next((c for c in sift.replaced.values() if c.norm == path), None)
    if call is None:
        return y
    if x.shape[-1] != sift.branches * call.f_out:
        raise ValueError(
            f"family 'parallel': batch norm {path!r} must take the "
            f"{sift.branches * call.f_out} channels of {call.path!r}, got {x.shape[-1]}"
        )
    y = nn.relu(y) if sift.branch_relu else y
    return sum_branches(y, sift.branches, call.groups)


def folded(
    first: jax.Array, second: jax.Array, kernel: jax.Array | None = None
) -> jax.Array:
    """The kernel of the one layer that linear factors are together.

    Args:
      first: U, `[height, width, in, rank]` or `[in, rank]`.
      second: V, `[1, 1, rank / groups, out]` or `[rank, out]`.
      kernel: S of a doped layer, which is added.

    Returns:
      `[height, width, in, out]` or `[in, out]`, `in` being that of a group.
    """
    *window, inputs, rank = first.shape
    second = second.reshape(second.shape[-2:])
    groups = rank // second.shape[0]
    parts = first.reshape(-1, inputs, groups, rank // groups)
    second = second.reshape(rank // groups, groups, -1)
    product = jnp.einsum("tigr,rgo->tigo", parts, second)
    product = product.reshape(*window, inputs, -1)
    return product if kernel is None else product + kernel


def sum_branches(x: jax.Array, branches: int, groups: int = 1) -> jax.Array:
    """Sums over branches that lie side by side in the channels of every group.

    Args:
      x: `[..., groups * branches * f]`.
      branches: the number of them.
      groups: of the convolution.

    Returns:
      `[..., groups * f]`.
    """
    *lead, channels = x.shape
    parts = x.reshape(*lead, groups, branches, channels // (groups * branches))
    return jnp.sum(parts, axis=-2).reshape(*lead, channels // branches)


def _factorized(
    sift: Sift, call: Call, layer: Any, compute: rules.Compute, x: jax.Array
) -> jax.Array:
    del compute
    y = _first(layer, sift.rank(call))(x)
    if sift.uv_layer != "linear" and call.norm:
        y = BatchNorm(dtype=layer.dtype, name="norm")(y, rules.training())
    if sift.uv_layer == "nonlinear_relu":
        y = nn.relu(y)
        rules.tell("relu", shape=y.shape)
    return _second(layer, call, use_bias=layer.use_bias)(y)


def _doped(
    sift: Sift, call: Call, layer: Any, compute: rules.Compute, x: jax.Array
) -> jax.Array:
    y, rank = compute(x), sift.rank(call)
    if rank == 0:
        return y
    return y + _second(layer, call, use_bias=False)(_first(layer, rank)(x))


def _first(layer: Any, rank: int) -> nn.Module:
    """U: the layer itself, with `rank` outputs."""
    common: Any = dict(use_bias=False, dtype=layer.dtype, name=FACTORS[0])
    if isinstance(layer, Dense):
        return Dense(rank, kernel_init=layer.kernel_init, **common)
    return Conv(
        rank,
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        input_dilation=layer.input_dilation,
        kernel_dilation=layer.kernel_dilation,
        feature_group_count=layer.feature_group_count,
        kernel_init=kaiming_normal,
        **common,
    )


def _second(layer: Any, call: Call, *, use_bias: bool) -> nn.Module:
    """V: from the rank to the layer's outputs, pixel by pixel."""
    common: Any = dict(
        use_bias=use_bias,
        bias_init=layer.bias_init,
        dtype=layer.dtype,
        name=FACTORS[1],
    )
    if isinstance(layer, Dense):
        init = nn.initializers.lecun_normal()
        return Dense(layer.features, kernel_init=init, **common)
    return Conv(
        layer.features,
        (1,) * len(layer.kernel_size),
        feature_group_count=call.groups,
        kernel_init=kaiming_normal,
        **common,
    )
