"""Lottery tickets: prune what was trained, rewind what is left, train again.

Rounds of one stage. Between them weights go back to those of an early epoch, and what
the optimiser remembers of pruned weights is zeroed. Its memory of the others, its
learning rate and the batch norms' running statistics go on, because a stage has one
schedule: take a constant learning rate, or one stage per round with `start_from`. Masks
are simulated; facts in the log are those of `jaxkd.sparsity.dynamic`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.compression import After, Arrays, Compression, State, register
from jaxkd.sparsity import schedules
from jaxkd.sparsity.dynamic import ScopeOptions, make_scope, masked_compression
from jaxkd.sparsity.magnitude import prune, prune_together
from jaxkd.sparsity.masks import Shapes, kept_count


@register()
def lottery(
    *,
    rate: float = 0.2,
    rounds: int = 4,
    prune_epochs: Sequence[float] | None = None,
    rewind_epoch: float = 3.0,
    distribution: Literal["global", "uniform"] = "global",
    scope: ScopeOptions = None,
) -> Compression:
    """Iterative magnitude pruning with rewinding.

    The weights at the end of epoch `rewind_epoch` are stored. After each round the
    smallest active weights are cut, `int(rate * active)` of them, and every parameter
    of the network (norms, biases and the classifier too) goes back to its stored value.
    `r` rounds leave about `(1 - rate)**r` of the weights; training goes on after the
    last one.

    Args:
      rate: the share of the active weights that a round cuts, in (0, 1).
      rounds: how often; they end after equal parts of the stage, the last part being
        the training of the ticket itself.
      prune_epochs: when rounds end, in epochs, in place of `rounds`.
      rewind_epoch: when the weights are stored, in epochs; 0 is the start.
      distribution: "global" compares the weights of all layers with each other,
        "uniform" cuts the same share of each.
      scope: which kernels are sparse; options of `jaxkd.sparsity.masks.Scope`.

    Raises:
      ValueError: an impossible value; from the update, a round that ends before the
        weights are stored or after the stage.

    Reference: Frankle and Carbin, "The lottery ticket hypothesis: finding sparse,
    trainable neural networks", ICLR 2019; Frankle et al., "Linear mode connectivity and
    the lottery ticket hypothesis", ICML 2020 (rewinding). Rate and epoch are those of
    Chen et al., "You are caught stealing my winning lottery ticket!", NeurIPS 2021.
    """
    _check(rate, rounds, prune_epochs, rewind_epoch)
    chosen = make_scope(scope)
    total_rounds = rounds if prune_epochs is None else len(prune_epochs)

    def init(key: jax.Array, params: Arrays) -> tuple[Arrays, State]:
        del key
        shapes = chosen.select(params)
        every = {path: jnp.ones(shape, bool) for path, shape in shapes.items()}
        # Copies: the stored weights must not share buffers with those that train.
        return {}, {"masks": every, "stored": jax.tree.map(jnp.copy, params)}

    def update(learned: Arrays, state: State, after: After) -> tuple[Arrays, State]:
        del learned
        store, steps = round_steps(
            after.total_steps,
            after.steps_per_epoch,
            rounds=rounds,
            prune_epochs=prune_epochs,
            rewind_epoch=rewind_epoch,
        )
        now = after.step + 1
        stored = schedules.at_steps(
            [store] if store else [], now, lambda i, _: after.params, state["stored"]
        )
        sizes = {path: mask.size for path, mask in state["masks"].items()}

        def change(
            index: jax.Array, values: tuple[Arrays, Arrays]
        ) -> tuple[Arrays, Arrays]:
            params, masks = values
            if distribution == "global":
                counts = remaining(sum(sizes.values()), rate, total_rounds)
                new = prune_together(
                    masks, params, jnp.asarray(counts)[index], outputs=chosen.outputs
                )
            else:
                new = {
                    path: prune(
                        mask,
                        params[path],
                        jnp.asarray(remaining(sizes[path], rate, total_rounds))[index],
                        outputs=chosen.outputs,
                    )
                    for path, mask in masks.items()
                }
            return stored, new

        params, masks = schedules.at_steps(
            steps, now, change, (after.params, state["masks"])
        )
        return params, {"masks": masks, "stored": stored}

    def target(shapes: Shapes) -> float:
        sizes = [math.prod(shape) for shape in shapes.values()]
        if distribution == "global":
            sizes = [sum(sizes)]
        left = sum(int(remaining(n, rate, total_rounds)[-1]) for n in sizes)
        return left / sum(sizes)

    return masked_compression(init=init, update=update, target=target)


def remaining(size: int, rate: float, rounds: int) -> np.ndarray:
    """How many of `size` weights are left after each round, int32 `[rounds]`."""
    counts = []
    for _ in range(rounds):
        size = kept_count(size, rate)
        counts.append(size)
    return np.asarray(counts, np.int32)


def round_steps(
    total_steps: int,
    steps_per_epoch: int,
    *,
    rounds: int,
    prune_epochs: Sequence[float] | None,
    rewind_epoch: float,
) -> tuple[int, list[int]]:
    """The step at which weights are stored, and those at which rounds end.

    Args:
      total_steps: of the stage.
      steps_per_epoch: of it.
      rounds: see `lottery`.
      prune_epochs: see `lottery`.
      rewind_epoch: see `lottery`.

    Returns:
      Steps counted from 1; 0 for weights that are stored at the start.

    Raises:
      ValueError: rounds do not follow the storing or each other, or leave no step of
        the stage.
    """
    store = round(rewind_epoch * steps_per_epoch)
    if prune_epochs is None:
        steps = [total_steps * (i + 1) // (rounds + 1) for i in range(rounds)]
    else:
        steps = [round(epoch * steps_per_epoch) for epoch in prune_epochs]
    times = [store, *steps, total_steps]
    if any(one >= other for one, other in zip(times, times[1:], strict=False)):
        raise ValueError(
            f"lottery: weights are stored at step {store} and rounds end at steps "
            f"{', '.join(map(str, steps))} of {total_steps}; each must follow the one "
            "before and the last leave steps to train; change rewind_epoch, rounds or "
            "prune_epochs, or train for longer"
        )
    return store, steps


def _check(
    rate: float,
    rounds: int,
    prune_epochs: Sequence[float] | None,
    rewind_epoch: float,
) -> None:
    if not 0.0 < rate < 1.0:
        raise ValueError(f"rate must be in (0, 1), got {rate}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if rewind_epoch < 0:
        raise ValueError(f"rewind_epoch must be at least 0, got {rewind_epoch}")
    if prune_epochs is not None and not len(prune_epochs):
        raise ValueError("prune_epochs is empty; name an epoch, or leave it out")
