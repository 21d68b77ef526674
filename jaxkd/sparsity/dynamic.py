"""Training with masks from the start: static, SET, RigL.

All keep the share of active weights and (but for `static`) let them move: every
`frequency` steps the smallest active weights are dropped and as many others grown,
after the step of the optimiser. Weights that are grown start at 0, and the train step
zeroes what the optimiser remembers of inactive ones.

The masks are simulated: dense hardware multiplies the zeros as well, so a step takes
the time of a dense one. Facts in the log: `density`, the share of the numbers of the
masked kernels that take part, and `target_density`, what it is to be in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.compression import (
    After,
    Arrays,
    Compression,
    InitFn,
    State,
    UpdateFn,
    masked,
    register,
)
from jaxkd.registry import check_options
from jaxkd.sparsity import masks as masks_lib
from jaxkd.sparsity import schedules
from jaxkd.sparsity.distributions import (
    Distribution,
    check_sparsity,
    densities,
    overall,
    sparsity_of,
)
from jaxkd.sparsity.masks import Scope, Shapes
from jaxkd.sparsity.schedules import Anneal

MaskInit = Literal["bernoulli", "random", "magnitude"]
Variant = Literal["sparse_ift", "google"]
ScopeOptions = Mapping[str, Any] | None
GrowthFn = Callable[[jax.Array, jax.Array], jax.Array]
"""`growth(key, dense_gradient) -> scores >= 0`."""

# Of the noise that the code of RigL's authors adds to weights before comparing them.
_NOISE = 1e-5


@register()
def static(
    *,
    sparsity: float = 0.9,
    distribution: Distribution = "uniform",
    power: float = 1.0,
    init: MaskInit = "bernoulli",
    scope: ScopeOptions = None,
) -> Compression:
    """Masks that are drawn once and stay.

    Args:
      sparsity: of the sparse kernels together, in [0, 1).
      distribution: among layers, see `jaxkd.sparsity.distributions.densities`.
      power: of the raw densities of "er" and "erk" (`erk_power_scale`).
      init: "bernoulli" sets every entry with probability `1 - s`, so that counts are
        random; "random" sets exact counts at random places; "magnitude" keeps the
        largest weights (`size - int(s * size)`).
      scope: which kernels are sparse; options of `jaxkd.sparsity.masks.Scope`.

    Raises:
      ValueError: an impossible value.
    """
    check_sparsity(sparsity)
    chosen = make_scope(scope)

    def layers(shapes: Shapes) -> dict[str, float]:
        return densities(shapes, sparsity, distribution=distribution, power=power)

    return masked_compression(
        init=masks_at_start(chosen, layers, init),
        target=lambda shapes: overall(shapes, layers(shapes)),
    )


@register("set")
def sparse_evolutionary(
    *,
    sparsity: float = 0.9,
    distribution: Distribution = "uniform",
    power: float = 1.0,
    init: MaskInit = "bernoulli",
    drop_fraction: float = 0.3,
    anneal: Anneal = "cosine",
    exponent: float = 1.0,
    frequency: int = 100,
    begin: float = 0.0,
    end: float = 0.75,
    variant: Variant = "sparse_ift",
    scope: ScopeOptions = None,
) -> Compression:
    """Sparse evolutionary training: dropped weights are replaced by random ones.

    Options are those of `rigl`.

    Reference: Mocanu et al., "Scalable training of artificial neural networks with
    adaptive sparse connectivity inspired by network science", Nature Communications
    2018.
    """

    def growth(key: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.random.uniform(key, gradient.shape)

    return _exchanging(
        growth,
        sparsity=sparsity,
        distribution=distribution,
        power=power,
        init=init,
        drop_fraction=drop_fraction,
        anneal=anneal,
        exponent=exponent,
        frequency=frequency,
        begin=begin,
        end=end,
        variant=variant,
        scope=scope,
    )


@register()
def rigl(
    *,
    sparsity: float = 0.9,
    distribution: Distribution = "uniform",
    power: float = 1.0,
    init: MaskInit = "bernoulli",
    drop_fraction: float = 0.3,
    anneal: Anneal = "cosine",
    exponent: float = 1.0,
    frequency: int = 100,
    begin: float = 0.0,
    end: float = 0.75,
    variant: Variant = "sparse_ift",
    scope: ScopeOptions = None,
) -> Compression:
    """RigL: dropped weights are replaced by those with the largest dense gradients.

    At step `t` (counted from 1) with `begin < t < end` that is a multiple of the
    frequency, in every layer with `n` active weights: the `n - int(f * n)` largest by
    absolute value stay, and of all others, those just dropped included, the ones with
    the largest absolute gradient of this step's batch grow until the layer has its
    target count. So a Bernoulli start is corrected at the first exchange. A weight that
    is dropped and grown at once keeps its value, others start at 0.

    `variant="google"` follows the code of RigL's authors where it differs: the first
    exchange is at the first step of the window (steps are counted from 0, the end is
    part of it), noise of standard deviation 1e-5 is added to the weights before they
    are compared, and exactly as many weights grow as were dropped. One difference is
    left: there the exchange takes the place of the optimiser's step, here it follows
    it.

    Args:
      sparsity: of the sparse kernels together, in [0, 1).
      distribution: among layers, see `jaxkd.sparsity.distributions.densities`.
      power: of the raw densities of "er" and "erk" (`erk_power_scale`).
      init: the first masks, see `static`.
      drop_fraction: `f` at the beginning, in [0, 1).
      anneal: how `f` goes on, see `jaxkd.sparsity.schedules.drop_fraction`.
      exponent: of the anneals "exponential" and "power".
      frequency: steps between exchanges.
      begin: the fraction of the stage's steps before the first exchange.
      end: the fraction from which on masks stay.
      variant: see above.
      scope: which kernels are sparse; options of `jaxkd.sparsity.masks.Scope`.

    Raises:
      ValueError: an impossible value.

    Reference: Evci et al., "Rigging the lottery: making all tickets winners", ICML
    2020; the variant "sparse_ift" is the code of Thangarasa et al., "Sparse-IFT: sparse
    iso-FLOP transformations for maximizing training efficiency", ICML 2024.
    """

    def growth(key: jax.Array, gradient: jax.Array) -> jax.Array:
        del key
        return jnp.abs(gradient)

    return _exchanging(
        growth,
        sparsity=sparsity,
        distribution=distribution,
        power=power,
        init=init,
        drop_fraction=drop_fraction,
        anneal=anneal,
        exponent=exponent,
        frequency=frequency,
        begin=begin,
        end=end,
        variant=variant,
        scope=scope,
    )


def _exchanging(
    growth: GrowthFn,
    *,
    sparsity: float,
    distribution: Distribution,
    power: float,
    init: MaskInit,
    drop_fraction: float,
    anneal: Anneal,
    exponent: float,
    frequency: int,
    begin: float,
    end: float,
    variant: Variant,
    scope: ScopeOptions,
) -> Compression:
    """SET and RigL, which differ by the scores of what grows."""
    check_sparsity(sparsity)
    check_sparsity(drop_fraction, "drop_fraction")
    schedules.check_window(begin, end, frequency)
    chosen = make_scope(scope)
    google = variant == "google"

    def layers(shapes: Shapes) -> dict[str, float]:
        return densities(shapes, sparsity, distribution=distribution, power=power)

    def change(
        index: jax.Array, values: tuple[Arrays, Arrays], after: After, fractions: Any
    ) -> tuple[Arrays, Arrays]:
        weights, masks = values
        wanted = layers({path: mask.shape for path, mask in masks.items()})
        new = {}
        for i, (path, mask) in enumerate(masks.items()):
            key = jax.random.fold_in(after.key, i)
            count = jnp.sum(mask, dtype=jnp.int32)
            noise = _NOISE * jax.random.normal(key, mask.shape) if google else 0.0
            new[path] = masks_lib.exchange(
                mask,
                weights[path],
                growth(jax.random.fold_in(key, 1), after.gradients[path]),
                drop=schedules.share_of(fractions, index, count),
                target=count if google else target_count(mask.size, wanted[path]),
                noise=noise,
                outputs=chosen.outputs,
            )
        return started(weights, masks), new

    def update(learned: Arrays, state: State, after: After) -> tuple[Arrays, State]:
        del learned
        first, last = schedules.window(after.total_steps, begin, end)
        if google:
            steps, now = np.arange(first, last + 1, frequency), after.step
        else:
            steps = schedules.steps_between(first, last, frequency)
            now = after.step + 1
        fractions = schedules.drop_fraction(
            steps, initial=drop_fraction, begin=first, end=last, anneal=anneal,
            exponent=exponent,
        )  # fmt: skip
        return change_masks(
            steps, now, state, after, lambda i, v: change(i, v, after, fractions)
        )

    return masked_compression(
        init=masks_at_start(chosen, layers, init),
        update=update,
        target=lambda shapes: overall(shapes, layers(shapes)),
    )


def target_count(size: int, density: float) -> int:
    """How many of a layer's numbers an exchange leaves active.

    The product is rounded to float32 as in the released code, where `(1 - 0.9) * 1000`
    would otherwise be 99.
    """
    return int(np.float32(density * size))


def started(weights: Arrays, masks: Arrays) -> Arrays:
    """The active weights; whatever grows next starts at 0."""
    return {path: jnp.where(masks[path], x, 0.0) for path, x in weights.items()}


def change_masks(
    steps: Any,
    now: jax.Array,
    state: State,
    after: After,
    change: Callable[[jax.Array, tuple[Arrays, Arrays]], tuple[Arrays, Arrays]],
) -> tuple[Arrays, State]:
    """Changes masks, and the weights that have one, at some steps.

    Args:
      steps: when, on the host.
      now: the step of now, counted as `steps` are.
      state: holds `masks`.
      after: see `jaxkd.compression.After`.
      change: `change(i, (weights, masks))` at `steps[i]` returns the new ones.

    Returns:
      Parameters and state, as from an update.
    """
    weights = {path: after.params[path] for path in state["masks"]}
    weights, masks = schedules.at_steps(steps, now, change, (weights, state["masks"]))
    return {**after.params, **weights}, {**state, "masks": masks}


def masks_at_start(
    scope: Scope, layers: Callable[[Shapes], Mapping[str, float]], kind: MaskInit
) -> InitFn:
    """An init that makes the first masks of the kernels in a scope.

    Args:
      scope: which kernels.
      layers: their densities, from their shapes.
      kind: see `static`.
    """

    def init(key: jax.Array, params: Arrays) -> tuple[Arrays, State]:
        shapes = scope.select(params)
        found = {}
        for i, (path, density) in enumerate(layers(shapes).items()):
            own, shape, sparse = (
                jax.random.fold_in(key, i),
                shapes[path],
                sparsity_of(density),
            )
            if kind == "magnitude":
                found[path] = masks_lib.magnitude_mask(
                    params[path], sparse, outputs=scope.outputs
                )
            elif kind == "random":
                count = masks_lib.kept_count(params[path].size, sparse)
                found[path] = masks_lib.random_mask(
                    own, shape, count, outputs=scope.outputs
                )
            else:
                found[path] = masks_lib.bernoulli_mask(
                    own, shape, sparse, outputs=scope.outputs
                )
        return {}, {"masks": found}

    return init


def masks_that_stay(
    learned: Arrays, state: State, after: After
) -> tuple[Arrays, State]:
    """An update that changes nothing."""
    del learned
    return after.params, state


def masked_compression(
    *,
    init: InitFn,
    target: Callable[[Shapes], float],
    update: UpdateFn = masks_that_stay,
) -> Compression:
    """A compression whose state holds `masks`, which cut the weights.

    Args:
      init: makes the state.
      target: the density that the masks are to have in the end, from their shapes.
      update: see `jaxkd.compression.UpdateFn`.
    """

    def effective(learned: Arrays, state: State, params: Arrays) -> Arrays:
        del learned
        cut = {p: masked(params[p], mask) for p, mask in state["masks"].items()}
        return {**params, **cut}

    def facts(learned: Arrays, state: State, params: Arrays) -> Arrays:
        del learned, params
        found = state["masks"]
        active = sum(jnp.sum(mask, dtype=jnp.int32) for mask in found.values())
        size = sum(mask.size for mask in found.values())
        wanted = target({path: mask.shape for path, mask in found.items()})
        return {
            "density": jnp.asarray(active, jnp.float32) / size,
            "target_density": jnp.float32(wanted),
        }

    return Compression(
        init=init,
        effective=effective,
        masks=lambda state: state["masks"],
        update=update,
        facts=facts,
    )


def make_scope(options: ScopeOptions) -> Scope:
    """The scope with these options.

    Raises:
      TypeError: an option that it does not have, or of a wrong type.
      ValueError: an impossible value.
    """
    found = dict(options or {})
    check_options(Scope, found, "scope")
    return Scope(**found)
