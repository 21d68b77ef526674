"""What becomes of a network whose layers are replaced at equal cost.

`transform` reads the structure of a network, chooses the layers by a `Scope`, replaces
them by a family of `jaxkd.sparsity.sift_layers` and finds the densities at which the
network costs what it did. No array is made.

Operations are counted as if zeros cost nothing (`jaxkd.sparsity.structure`); on dense
hardware they cost as much as any number.

Reference: Thangarasa, Saxena, Gupta, Lie, "Sparse-IFT: Sparse Iso-FLOP Transformations
for Maximizing Training Efficiency", ICML 2024, and the authors' code.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax

from jaxkd.sparsity import iso_flop
from jaxkd.sparsity.distributions import Distribution, densities
from jaxkd.sparsity.masks import Scope
from jaxkd.sparsity.sift_layers import (
    FACTORS,
    Family,
    Sift,
    UVLayer,
    apply_plan,
    base_width,
)
from jaxkd.sparsity.structure import Flops, Structure, read_structure

# Shortcuts of residual blocks, by their paths: sparse, but not replaced.
Shortcuts = Literal["sparse", "dense", "replaced"]
SHORTCUT = r"(^|/)shortcut(/|$)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is to be made of a network.

    Attributes:
      family: what replaces its layers; "dense" only makes them sparse.
      sparsity: the share of zeros that sizes are computed for.
      distribution: how it is shared among the layers.
      scope: which kernels are sparse, see `jaxkd.sparsity.masks.Scope`.
      uv_layer: what stands between factors: nothing ("linear"), a batch norm
        ("nonlinear_norelu"), or a batch norm and a ReLU.
      branch_relu: whether parallel branches end with a ReLU each, as in the authors'
        ImageNet networks.
      mask_low_rank: whether the factors of the doped family are sparse too, as in the
        released code; the network then costs less than the dense one.
      shortcuts: what becomes of the 1x1 convolutions of shortcuts (the wide family
        grows them in any case): "sparse" as they are, "dense", or "replaced" like the
        other layers. None is what the published networks have: "sparse", but "dense"
        in the doped family unless `mask_low_rank`.
      base_width: the unit of widths of the wide family; that of the first layer (per
        attention head) if None.
      search: whether the wide family's sparsity is searched so that the network meets
        the cost of the dense one, as in the released code.
      any_cost: whether sparsities are taken that no whole number of branches fits.
      ranks: by patterns (`re.search` on the path of the layer), ranks in the place of
        the iso-FLOP ones.

    Raises:
      ValueError: a sparsity outside of 0 to below 1, one that is not iso-FLOP, or
        options of another family.
    """

    family: Family = "wide"
    sparsity: float = 0.75
    distribution: Distribution = "uniform"
    scope: Scope = dataclasses.field(default_factory=Scope)
    uv_layer: UVLayer = "nonlinear_relu"
    branch_relu: bool = False
    mask_low_rank: bool = False
    shortcuts: Shortcuts | None = None
    base_width: int | None = None
    search: bool = True
    any_cost: bool = False
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the options against each other."""
        iso_flop.check_sparsity(self.sparsity)
        if self.family in ("wide", "parallel") and not self.any_cost:
            iso_flop.check_branches(self.sparsity)
        if self.base_width is not None and self.base_width < 1:
            raise ValueError(f"base_width must be >= 1, got {self.base_width}")
        for option, families in (
            ("branch_relu", ("parallel",)),
            ("mask_low_rank", ("doped",)),
            ("base_width", ("wide",)),
            ("ranks", ("factorized", "doped")),
        ):
            if getattr(self, option) and self.family not in families:
                raise ValueError(
                    f"{option} is an option of the family {' or '.join(families)}, got "
                    f"family {self.family!r}; leave it out"
                )
        for pattern, rank in self.ranks.items():
            if rank < 1:
                raise ValueError(f"ranks: {pattern!r} must be >= 1, got {rank}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformed:
    """A network whose layers are replaced.

    Attributes:
      recipe: what was to be made of it.
      sift: how its layers are replaced.
      structure: what it consists of.
      sparse: shapes of its sparse kernels, by path.
      sparsity: the share of zeros of these, searched if the recipe has it so.
      densities: of each of them.
    """

    recipe: Recipe
    sift: Sift
    structure: Structure
    sparse: Mapping[str, tuple[int, ...]]
    sparsity: float
    densities: Mapping[str, float]

    @property
    def dense_flops(self) -> Flops:
        """Operations of the dense network."""
        return self.sift.dense.flops()

    @property
    def flops(self) -> Flops:
        """Operations of this one, zeros left out."""
        return self.structure.flops(self.densities)

    @property
    def unmasked_flops(self) -> Flops:
        """Operations of this one with its zeros."""
        return self.structure.flops()

    @property
    def params(self) -> int:
        """Numbers in its parameters, zeros and all."""
        return sum(math.prod(shape) for shape in self.structure.params.values())


def transform(
    module: nn.Module, *args: Any, recipe: Recipe, **kwargs: Any
) -> Transformed:
    """Plans the replacement of a network's layers; makes no array.

    Args:
      module: a Linen module.
      *args: what it is called with; arrays may be `jax.ShapeDtypeStruct`s.
      recipe: what is to be made of it.
      **kwargs: further, static, arguments of the call.

    Raises:
      ValueError: a layer that the family cannot replace, a network that the family
        would change, or one that no sparsity brings to the cost of the dense one.

    >>> from jaxkd import models
    >>> network = models.create("resnet18", num_classes=100, stem="cifar")
    >>> images = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    >>> recipe = Recipe(family="parallel", sparsity=0.5)
    >>> made = transform(network, images, recipe=recipe)
    >>> made.flops.total, made.params
    (1112372312, 22213284)
    """
    dense = read_structure(module, *args, **kwargs)
    arrays = {p: jax.ShapeDtypeStruct(s, "float32") for p, s in dense.params.items()}
    chosen = {p.rpartition("/")[0] for p in recipe.scope.select(arrays)}
    shortcuts = recipe.shortcuts
    if shortcuts is None:
        kept = recipe.family == "doped" and not recipe.mask_low_rank
        shortcuts = "dense" if kept else "sparse"
    if shortcuts == "dense":
        chosen = {path for path in chosen if not re.search(SHORTCUT, path)}
    calls = {c.path: c for c in dense.calls if c.path in chosen}
    unknown = chosen - calls.keys()
    if unknown:
        raise ValueError(
            f"layer {min(unknown)!r} is none of jaxkd's Conv and Dense, so it cannot "
            "be replaced; leave it dense by scope.dense"
        )
    replaced = {
        path: call
        for path, call in calls.items()
        if recipe.family != "dense"
        and recipe.sparsity > 0
        and (
            shortcuts == "replaced"
            or recipe.family == "wide"
            or not re.search(SHORTCUT, path)
        )
    }
    sift = Sift(
        # Without zeros every family is the dense layer.
        family=recipe.family if recipe.sparsity else "dense",
        sparsity=recipe.sparsity,
        dense=dense,
        replaced=replaced,
        base_width=recipe.base_width or base_width(dense),
        uv_layer=recipe.uv_layer,
        branch_relu=recipe.branch_relu,
        ranks=recipe.ranks,
    )
    structure = dense
    if sift.family != "dense":
        structure = apply_plan(sift, module, *args, **kwargs)
    paths = [p for path in calls for p in _kernels(sift, path, recipe.mask_low_rank)]
    sparse = {path: structure.params[path] for path in paths}

    def shared(sparsity: float) -> dict[str, float]:
        return densities(sparse, sparsity, distribution=recipe.distribution)

    sparsity = recipe.sparsity
    if sift.family == "wide" and recipe.search:
        sparsity = iso_flop.search_sparsity(
            lambda s: structure.flops(shared(s)).total, dense.flops().total
        )
    return Transformed(
        recipe=recipe,
        sift=sift,
        structure=structure,
        sparse=sparse,
        sparsity=sparsity,
        densities=shared(sparsity),
    )


def _kernels(sift: Sift, path: str, mask_low_rank: bool) -> list[str]:
    """The sparse kernels in the place of a layer."""
    factors = [f"{path}/{name}/kernel" for name in FACTORS]
    call = sift.replaced.get(path)
    if call is None or sift.family not in ("factorized", "doped"):
        return [f"{path}/kernel"]
    if sift.family == "factorized":
        return factors
    return [f"{path}/kernel", *(factors if mask_low_rank and sift.rank(call) else ())]
