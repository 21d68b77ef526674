"""Sparse iso-FLOP training as a compression: larger sparse layers at equal cost.

`sparse_ift` replaces the layers of any network made of `jaxkd.layers` by one of four
families of larger layers (`jaxkd.sparsity.sift_layers`), and trains them with masks
whose sparsity brings the number of operations back to that of the dense network. The
masks stay, or change as in SET, RigL or GraNet (`jaxkd.sparsity.dynamic`).

Operations are counted as if zeros cost nothing. That is simulated: on dense hardware
the network runs as slowly as its larger layers do.

Reference: Thangarasa, Saxena, Gupta, Lie, "Sparse-IFT: Sparse Iso-FLOP Transformations
for Maximizing Training Efficiency", ICML 2024.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkd import compression
from jaxkd.compression import After, Arrays, Compression, State, register
from jaxkd.sparsity.distributions import Distribution
from jaxkd.sparsity.dynamic import ScopeOptions, make_scope
from jaxkd.sparsity.masks import is_kernel
from jaxkd.sparsity.sift_layers import (
    FACTORS,
    Family,
    Sift,
    UVLayer,
    folded,
    replacing,
)
from jaxkd.sparsity.sift_network import Recipe, Shortcuts, Transformed, transform

Updates = Literal["static", "set", "rigl", "granet"]


@register()
def sparse_ift(
    *,
    family: Family,
    sparsity: float = 0.75,
    distribution: Distribution = "uniform",
    updates: Updates = "rigl",
    schedule: Mapping[str, Any] | None = None,
    scope: ScopeOptions = None,
    uv_layer: UVLayer = "nonlinear_relu",
    branch_relu: bool = False,
    mask_low_rank: bool = False,
    shortcuts: Shortcuts | None = None,
    base_width: int | None = None,
    search: bool = True,
    any_cost: bool = False,
    ranks: Mapping[str, int] | None = None,
    joint_decay: float = 0.0,
) -> Compression:
    """Larger sparse layers that cost as much as the dense ones they replace.

    Facts in the log, beside those of the masks: `flops_share`, the operations of a
    forward pass with the masks of now, zeros left out, as a share of the dense
    network's. That is what sparse hardware could spare; dense hardware computes the
    zeros too.

    Args:
      family: "wide", "parallel", "factorized", "doped", or "dense" for masks alone.
      sparsity: the share of zeros; 0 leaves the network as it is.
      distribution: of the zeros among layers, see `jaxkd.sparsity.distributions`. Sizes
        are those of the uniform one.
      updates: the compression that makes the masks and lets them move.
      schedule: further options of that compression, e.g. `frequency` of "rigl".
        GraNet begins at a sparsity of 0.5 or, if that is more, where it ends.
      scope: which kernels are sparse; options of `jaxkd.sparsity.masks.Scope`, paths
        being those of the dense network.
      uv_layer: see `jaxkd.sparsity.sift_network.Recipe`; the others up to `ranks` too.
      branch_relu: see there.
      mask_low_rank: see there.
      shortcuts: see there.
      base_width: see there.
      search: see there.
      any_cost: see there.
      ranks: see there.
      joint_decay: for linear factors (doped, or factorized with `uv_layer="linear"`),
        the weight decay of the one kernel that they are together (S + V U if doped):
        0.5 * joint_decay * ||.||^2. It takes the place of the optimiser's decay of
        these kernels if it equals `weight_decay` of SGD or Adam, which it cancels.

    Raises:
      ValueError: an impossible value, here or, naming the layer, when the network is
        known.

    Reference: Thangarasa et al., "Sparse-IFT: Sparse Iso-FLOP Transformations for
    Maximizing Training Efficiency", ICML 2024.
    """
    recipe = Recipe(
        family=family,
        sparsity=sparsity,
        distribution=distribution,
        scope=make_scope(scope),
        uv_layer=uv_layer,
        branch_relu=branch_relu,
        mask_low_rank=mask_low_rank,
        shortcuts=shortcuts,
        base_width=base_width,
        search=search,
        any_cost=any_cost,
        ranks=dict(ranks or {}),
    )
    if joint_decay < 0:
        raise ValueError(f"joint_decay must be >= 0, got {joint_decay}")
    linear = family == "doped" or (family == "factorized" and uv_layer == "linear")
    if joint_decay and not linear:
        raise ValueError(
            "joint_decay is for linear factors: family='doped', or 'factorized' with "
            f"uv_layer='linear'; got family {family!r}"
        )

    def make(sparsity: float, scope: ScopeOptions) -> Compression:
        options = dict(sparsity=sparsity, distribution=distribution, scope=scope)
        if updates == "granet":
            # It may not begin sparser than it ends.
            options["initial_sparsity"] = min(0.5, sparsity)
        return compression.create(updates, **{**options, **(schedule or {})})

    for name in ("sparsity", "distribution", "scope"):
        if name in (schedule or {}):
            raise ValueError(f"schedule: {name} is an option of sparse_ift itself")
    masks = make(sparsity, None).masks
    if sparsity == 0:
        return Compression(init=lambda key, params: ({}, {}))
    plans = _Plans(recipe)

    @functools.cache
    def part(made: _Known) -> Compression:
        return make(made.transformed.sparsity, made.scope)

    def init(key: jax.Array, params: Arrays) -> tuple[Arrays, State]:
        return part(plans.of(params)).init(key, params)

    def effective(learned: Arrays, state: State, params: Arrays) -> Arrays:
        return part(plans.of(params)).effective(learned, state, params)

    def update(learned: Arrays, state: State, after: After) -> tuple[Arrays, State]:
        return part(plans.of(after.params)).update(learned, state, after)

    def facts(learned: Arrays, state: State, params: Arrays) -> Arrays:
        known = plans.of(params)
        found = part(known).facts(learned, state, params)
        return {**found, "flops_share": _flops_share(known.transformed, masks(state))}

    def terms(learned: Arrays, state: State, params: Arrays) -> Arrays:
        cut = effective(learned, state, params)
        return {"joint_decay": _joint_decay(plans.of(params).transformed, cut)}

    @contextlib.contextmanager
    def layers(train: bool) -> Any:
        with replacing(plans, train=train):
            yield

    made = Compression(
        init=init,
        effective=effective,
        masks=masks,
        update=update,
        facts=facts,
        layers=layers,
    )
    if not joint_decay:
        return made
    return dataclasses.replace(
        made, terms=terms, weights={"joint_decay": float(joint_decay)}
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Known:
    """A network that was run, and the scope that selects its sparse kernels."""

    transformed: Transformed

    @property
    def scope(self) -> dict[str, Any]:
        kernels = {
            path
            for path, shape in self.transformed.structure.params.items()
            if is_kernel(path, shape)
        }
        sparse = self.transformed.sparse.keys()
        recipe = self.transformed.recipe.scope
        return {
            "sparse": tuple(f"^{re.escape(path)}$" for path in sorted(sparse)),
            "dense": tuple(f"^{re.escape(path)}$" for path in sorted(kernels - sparse)),
            "outputs": recipe.outputs,
        }


class _Plans:
    """What becomes of the networks that run with a recipe.

    A compression sees a network twice: as a module, when it runs within `layers`, and
    as parameters by path. The shapes of the parameters tell which network they are of.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._made: dict[Any, Transformed] = {}
        self._known: dict[Any, _Known] = {}

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Sift | None:
        shapes = [
            (x.shape[1:], str(x.dtype)) if isinstance(x, jax.Array) else x for x in args
        ]
        # The mode changes nothing of the structure.
        kwargs = {**kwargs, **({"train": False} if "train" in kwargs else {})}
        # Modules that hold modules have no hash while they run.
        key = (type(module), repr(module), repr(shapes), repr(sorted(kwargs.items())))
        if key not in self._made:
            made = transform(module, *args, recipe=self.recipe, **kwargs)
            self._made[key] = made
            signature = frozenset(made.structure.params.items())
            self._known.setdefault(signature, _Known(transformed=made))
        sift = self._made[key].sift
        return None if sift.family == "dense" else sift

    def of(self, params: Arrays) -> _Known:
        """The network with these parameters.

        Raises:
          ValueError: none that was run has them.
        """
        signature = frozenset((path, x.shape) for path, x in params.items())
        if signature not in self._known:
            raise ValueError(
                "sparse_ift replaces layers of Linen networks made of jaxkd.layers; "
                "this network has other parameters than the one whose layers were "
                "replaced"
            )
        return self._known[signature]


def _flops_share(made: Transformed, masks: Arrays) -> jax.Array:
    """Operations with these masks as a share of the dense network's, float32."""
    dense = made.dense_flops.total
    rest = made.structure.flops(dict.fromkeys(made.sparse, 0.0)).total
    share = jnp.float32(rest / dense)
    for path, mask in masks.items():
        scale = made.structure.kernel_flops(path) / dense
        share = share + scale * jnp.mean(mask.astype(jnp.float32))
    return share


def _joint_decay(made: Transformed, params: Arrays) -> jax.Array:
    """Half the squares of folded kernels, less those of their parts."""
    total = jnp.float32(0)
    for path in made.sift.replaced:
        names = [f"{path}/kernel", *(f"{path}/{name}/kernel" for name in FACTORS)]
        parts = [params.get(name) for name in names]
        kernel, first, second = parts
        if first is None or second is None:  # a doped layer of rank 0
            continue
        total = total + jnp.sum(jnp.square(folded(first, second, kernel)))
        total = total - sum(jnp.sum(jnp.square(x)) for x in parts if x is not None)
    return 0.5 * total
