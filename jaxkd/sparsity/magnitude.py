"""Pruning by magnitude: at once, along a ramp, and along a ramp with regrowth.

`magnitude` cuts the smallest weights at the start, for networks that start from a
trained one (`start_from`). `gmp` begins dense and follows the cubic ramp. `granet` does
both: it begins half sparse, prunes along the ramp, and at each step of it exchanges
weights as RigL does. What the log says is as in `jaxkd.sparsity.dynamic`; masks are
simulated here as well.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.compression import After, Arrays, Compression, InitFn, State, register
from jaxkd.sparsity import masks as masks_lib
from jaxkd.sparsity import schedules
from jaxkd.sparsity.distributions import (
    Distribution,
    check_sparsity,
    densities,
    overall,
    sparsity_of,
)
from jaxkd.sparsity.dynamic import (
    MaskInit,
    ScopeOptions,
    change_masks,
    make_scope,
    masked_compression,
    masks_at_start,
    started,
)
from jaxkd.sparsity.masks import Outputs, Scope, Shapes
from jaxkd.sparsity.schedules import Anneal

PruneDistribution = Distribution | Literal["global"]


@register()
def magnitude(
    *,
    sparsity: float = 0.9,
    distribution: PruneDistribution = "uniform",
    power: float = 1.0,
    scope: ScopeOptions = None,
) -> Compression:
    """Keeps the largest weights that a network starts with; the masks stay.

    With a stage's `start_from` these are the weights of a trained network, which is
    then fine-tuned.

    Args:
      sparsity: of the sparse kernels together, in [0, 1).
      distribution: among layers, see `jaxkd.sparsity.distributions.densities`; "global"
        compares the weights of all layers with each other.
      power: of the raw densities of "er" and "erk" (`erk_power_scale`).
      scope: which kernels are sparse; options of `jaxkd.sparsity.masks.Scope`.

    Raises:
      ValueError: an impossible value.

    Reference: Han et al., "Learning both weights and connections for efficient neural
    networks", NeurIPS 2015.
    """
    check_sparsity(sparsity)
    return masked_compression(
        init=_largest(make_scope(scope), sparsity, distribution, power),
        target=lambda shapes: overall(
            shapes, _layers(shapes, sparsity, distribution, power)
        ),
    )


@register()
def gmp(
    *,
    sparsity: float = 0.9,
    initial_sparsity: float = 0.0,
    distribution: PruneDistribution = "uniform",
    power: float = 1.0,
    frequency: int = 100,
    begin: float = 0.0,
    end: float = 0.75,
    scope: ScopeOptions = None,
) -> Compression:
    """Gradual magnitude pruning: the smallest weights go, along a cubic ramp.

    At step `t` (counted from 1) with `begin < t < end` that is a multiple of the
    frequency, and at the end itself, every layer keeps its `size - int(s_t * size)`
    largest active weights. What was pruned does not come back.

    Args:
      sparsity: in the end, of the sparse kernels together, in [0, 1).
      initial_sparsity: at the beginning, by magnitude; at most `sparsity`.
      distribution: among layers, see `jaxkd.sparsity.distributions.densities`; each
        follows the ramp between its own two ends. "global" compares the weights of all
        layers with each other.
      power: of the raw densities of "er" and "erk" (`erk_power_scale`).
      frequency: steps between prunings.
      begin: the fraction of the stage's steps before the ramp.
      end: the fraction at which it is over.
      scope: which kernels are sparse; options of `jaxkd.sparsity.masks.Scope`.

    Raises:
      ValueError: an impossible value.

    Reference: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of
    pruning for model compression", ICLR 2018 workshop.
    """
    _check_ramp(initial_sparsity, sparsity)
    schedules.check_window(begin, end, frequency)
    chosen = make_scope(scope)

    def update(learned: Arrays, state: State, after: After) -> tuple[Arrays, State]:
        del learned
        first, last = schedules.window(after.total_steps, begin, end)
        steps = schedules.steps_until(first, last, frequency)
        ramp = dict(begin=first, end=last)
        shapes = {path: mask.shape for path, mask in state["masks"].items()}
        if distribution == "global":
            wanted = schedules.cubic_sparsity(
                steps, initial=initial_sparsity, final=sparsity, **ramp
            )
            total = _counts(sum(math.prod(s) for s in shapes.values()), wanted)
        else:
            ends = _ends(shapes, initial_sparsity, sparsity, distribution, power)
            layer_counts = {
                path: _counts(
                    math.prod(shapes[path]),
                    schedules.cubic_sparsity(steps, initial=i, final=f, **ramp),
                )
                for path, (i, f) in ends.items()
            }

        def change(
            index: jax.Array, values: tuple[Arrays, Arrays]
        ) -> tuple[Arrays, Arrays]:
            weights, masks = values
            if distribution == "global":
                return weights, prune_together(
                    masks, weights, jnp.asarray(total)[index], outputs=chosen.outputs
                )
            return weights, {
                path: prune(
                    mask,
                    weights[path],
                    jnp.asarray(layer_counts[path])[index],
                    outputs=chosen.outputs,
                )
                for path, mask in masks.items()
            }

        return change_masks(steps, after.step + 1, state, after, change)

    return masked_compression(
        init=_largest(chosen, initial_sparsity, distribution, power),
        update=update,
        target=lambda shapes: overall(
            shapes, _layers(shapes, sparsity, distribution, power)
        ),
    )


@register()
def granet(
    *,
    sparsity: float = 0.9,
    initial_sparsity: float = 0.5,
    distribution: Distribution = "uniform",
    power: float = 1.0,
    init: MaskInit = "bernoulli",
    drop_fraction: float = 0.3,
    anneal: Anneal = "cosine",
    exponent: float = 1.0,
    frequency: int = 100,
    begin: float = 0.0,
    end: float = 0.75,
    scope: ScopeOptions = None,
) -> Compression:
    """GraNet: a cubic ramp from a sparse start, with an exchange after each pruning.

    At the steps of `gmp` every layer is pruned by magnitude to the count of the ramp;
    then `int(f * count)` of these are dropped and as many grown by the dense gradient,
    as `rigl` does. With `initial_sparsity=0` it begins dense.

    Args:
      sparsity: in the end, of the sparse kernels together, in [0, 1).
      initial_sparsity: at the beginning; at most `sparsity`.
      distribution: among layers, see `jaxkd.sparsity.distributions.densities`; each
        follows the ramp between its own two ends.
      power: of the raw densities of "er" and "erk" (`erk_power_scale`).
      init: the first masks, see `jaxkd.sparsity.dynamic.static`.
      drop_fraction: `f` at the beginning, in [0, 1).
      anneal: how `f` goes on, see `jaxkd.sparsity.schedules.drop_fraction`.
      exponent: of the anneals "exponential" and "power".
      frequency: steps between changes of the masks.
      begin: the fraction of the stage's steps before the ramp.
      end: the fraction at which ramp and exchanges are over.
      scope: which kernels are sparse; options of `jaxkd.sparsity.masks.Scope`.

    Raises:
      ValueError: an impossible value.

    Reference: Liu et al., "Sparse training via boosting pruning plasticity with
    neuroregeneration", NeurIPS 2021. Their code compares the weights of all layers when
    it prunes; here each layer has its own count.
    """
    _check_ramp(initial_sparsity, sparsity)
    check_sparsity(drop_fraction, "drop_fraction")
    schedules.check_window(begin, end, frequency)
    chosen = make_scope(scope)

    def update(learned: Arrays, state: State, after: After) -> tuple[Arrays, State]:
        del learned
        first, last = schedules.window(after.total_steps, begin, end)
        steps = schedules.steps_until(first, last, frequency)
        ramp = dict(begin=first, end=last)
        shapes = {path: mask.shape for path, mask in state["masks"].items()}
        ends = _ends(shapes, initial_sparsity, sparsity, distribution, power)
        fractions = schedules.drop_fraction(
            steps, initial=drop_fraction, anneal=anneal, exponent=exponent, **ramp
        )
        counts = {
            path: _counts(
                math.prod(shapes[path]),
                schedules.cubic_sparsity(steps, initial=i, final=f, **ramp),
            )
            for path, (i, f) in ends.items()
        }

        def change(
            index: jax.Array, values: tuple[Arrays, Arrays]
        ) -> tuple[Arrays, Arrays]:
            weights, masks = values
            new = {}
            for path, mask in masks.items():
                count = jnp.asarray(counts[path])[index]
                pruned = prune(mask, weights[path], count, outputs=chosen.outputs)
                left = jnp.sum(pruned, dtype=jnp.int32)
                new[path] = masks_lib.exchange(
                    pruned,
                    weights[path],
                    jnp.abs(after.gradients[path]),
                    drop=schedules.share_of(fractions, index, left),
                    target=count,
                    outputs=chosen.outputs,
                )
            return started(weights, masks), new

        return change_masks(steps, after.step + 1, state, after, change)

    return masked_compression(
        init=masks_at_start(
            chosen,
            lambda s: densities(
                s, initial_sparsity, distribution=distribution, power=power
            ),
            init,
        ),
        update=update,
        target=lambda shapes: overall(
            shapes, _layers(shapes, sparsity, distribution, power)
        ),
    )


def prune(
    mask: jax.Array,
    weights: jax.Array,
    count: int | jax.Array,
    *,
    outputs: Outputs = "any",
) -> jax.Array:
    """Leaves the `count` largest active weights, or all if they are fewer.

    Args:
      mask: bool.
      weights: in its shape.
      count: int32.
      outputs: "one" leaves the largest weight of every output channel first.
    """
    scores = masks_lib.active_scores(mask, weights, outputs=outputs)
    active = jnp.sum(mask, dtype=jnp.int32)
    return masks_lib.topk_mask(scores, jnp.minimum(count, active))


def prune_together(
    masks: Arrays,
    weights: Arrays,
    count: int | jax.Array,
    *,
    outputs: Outputs = "any",
) -> Arrays:
    """Leaves the `count` largest active weights of all layers taken together.

    Args:
      masks: bool, by path.
      weights: in their shapes, by path; others are ignored.
      count: over all layers, int32.
      outputs: "one" leaves the largest weight of every output channel first.
    """
    scores = {
        path: masks_lib.active_scores(mask, weights[path], outputs=outputs)
        for path, mask in masks.items()
    }
    active = sum(jnp.sum(mask, dtype=jnp.int32) for mask in masks.values())
    return masks_lib.topk_masks(scores, jnp.minimum(jnp.asarray(count), active))


def _largest(
    scope: Scope, sparsity: float, distribution: PruneDistribution, power: float
) -> InitFn:
    """An init that keeps the largest weights, per layer or of all layers together."""
    if distribution != "global":
        return masks_at_start(
            scope, lambda s: _layers(s, sparsity, distribution, power), "magnitude"
        )

    def init(key: jax.Array, params: Arrays) -> tuple[Arrays, State]:
        del key
        shapes = scope.select(params)
        every = {path: jnp.ones(shape, bool) for path, shape in shapes.items()}
        count = masks_lib.kept_count(sum(map(math.prod, shapes.values())), sparsity)
        masks = prune_together(every, params, count, outputs=scope.outputs)
        return {}, {"masks": masks}

    return init


def _layers(
    shapes: Shapes, sparsity: float, distribution: PruneDistribution, power: float
) -> dict[str, float]:
    """Densities by path; "global" is uniform on the whole."""
    kind: Any = "uniform" if distribution == "global" else distribution
    return densities(shapes, sparsity, distribution=kind, power=power)


def _ends(
    shapes: Shapes,
    initial: float,
    final: float,
    distribution: PruneDistribution,
    power: float,
) -> dict[str, tuple[float, float]]:
    """Sparsities of every layer at the two ends of a ramp."""
    start = _layers(shapes, initial, distribution, power)
    stop = _layers(shapes, final, distribution, power)
    return {path: (sparsity_of(start[path]), sparsity_of(stop[path])) for path in start}


def _counts(size: int, sparsities: np.ndarray) -> np.ndarray:
    """How many numbers stay at each sparsity, int32."""
    kept = [masks_lib.kept_count(size, float(s)) for s in sparsities]
    return np.asarray(kept, np.int32)


def _check_ramp(initial: float, final: float) -> None:
    check_sparsity(final)
    check_sparsity(initial, "initial_sparsity")
    if initial > final:
        raise ValueError(
            f"initial_sparsity must be at most sparsity, got {initial} and {final}"
        )
