"""Selection of single records: by rank, by chance, by a proxy network.

Formulas are for the losses `l_i` of `n` records.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from jaxkd.select.registry import register
from jaxkd.select.selection import Selection, SelectionData, State


def hardest(losses: Real[Array, " n"], count: int) -> Int[Array, " count"]:
    """The places of the `count` largest losses, ascending.

    Of equal losses the first ones are taken; a loss that is not a number counts as the
    largest.

    >>> hardest(jnp.array([0.3, 0.9, 0.1, 0.9]), 2).tolist()
    [1, 3]
    """
    order = jnp.argsort(_comparable(losses), stable=True, descending=True)
    return jnp.sort(order[:count]).astype(jnp.int32)


def history_probability(
    losses: Real[Array, " n"], history: Real[Array, " h"], beta: float | jax.Array
) -> Float[Array, " n"]:
    """`F(l)^beta` with `F` the share of the history that is at most `l`.

    Values of the history that are not numbers do not count; of an empty history `F` is
    1.

    Reference: Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest
    Losers", 2019 (arXiv 1910.00762).
    """
    known = ~jnp.isnan(history)
    below = (history[None, :] <= losses[:, None]) & known[None, :]
    share = jnp.sum(below, axis=1) / jnp.maximum(jnp.sum(known), 1)
    return jnp.where(jnp.any(known), share, 1.0) ** beta


def loss_rank_probability(
    losses: Real[Array, " n"], pressure: float | jax.Array
) -> Float[Array, " n"]:
    """`p_i` proportional to `exp(-rank_i ln(s) / n)`, rank 0 the largest loss.

    The record of the largest loss is about `s` times as likely as that of the smallest.

    Reference: Loshchilov and Hutter, "Online Batch Selection for Faster Training of
    Neural Networks", 2015 (arXiv 1511.06343).
    """
    count = len(losses)
    order = jnp.argsort(_comparable(losses), stable=True, descending=True)
    ranks = jnp.zeros(count, losses.dtype).at[order].set(
        jnp.arange(count, dtype=losses.dtype)
    )  # fmt: skip
    weights = jnp.exp(-ranks * jnp.log(pressure) / count)
    return weights / jnp.sum(weights)


def el2n(
    logits: Real[Array, "n classes"], labels: Int[Array, " n"]
) -> Float[Array, " n"]:
    """`||softmax(z) - onehot(y)||_2`, the score by which data are pruned early.

    The score of a record is its mean over several networks early in training; the
    highest ones are kept (`hardest(scores, int(keep * n))`).

    Reference: Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021
    (arXiv 2107.07075).
    """
    onehot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return jnp.linalg.norm(jax.nn.softmax(logits, axis=-1) - onehot, axis=-1)


@register("ohem")
def ohem(*, keep: float = 0.25) -> Selection:
    """Online hard example mining: the mean loss of the `int(keep n)` hardest records.

    Args:
      keep: share of every batch, in (0, 1].

    Raises:
      ValueError: keep is outside (0, 1], or leaves no record of a batch.

    Reference: Shrivastava, Gupta, Girshick, "Training Region-based Object Detectors
    with Online Hard Example Mining", CVPR 2016.
    """
    _check_share("keep", keep)

    def init(key: jax.Array, data: SelectionData) -> State:
        del key
        _kept("keep", keep, data.batch_size)
        return {}

    def weigh(state: State, losses: jax.Array, key: jax.Array) -> jax.Array:
        del state, key
        count = _kept("keep", keep, len(losses))
        weights = jnp.zeros(len(losses), jnp.float32)
        return weights.at[hardest(losses, count)].set(len(losses) / count)

    return Selection(init=init, weigh=weigh)


@register("selective_backprop")
def selective_backprop(*, beta: float = 1.0, history: int = 1024) -> Selection:
    """A record is trained on with probability `F(l)^beta` (`history_probability`).

    The loss of a step is the mean over the selected records, 0 if there is none.

    Args:
      beta: selectivity, above 0: larger values leave more records out.
      history: how many of the latest losses `F` is made of.

    Raises:
      ValueError: an argument is not positive.

    Reference: Jiang et al., 2019 (arXiv 1910.00762).
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive, got {beta}")
    if history < 1:
        raise ValueError(f"history must be at least 1, got {history}")

    def init(key: jax.Array, data: SelectionData) -> State:
        del key, data
        return {
            "history": jnp.full(history, jnp.nan, jnp.float32),
            "next": jnp.zeros((), jnp.int32),
        }

    def weigh(state: State, losses: jax.Array, key: jax.Array) -> jax.Array:
        chance = history_probability(losses, state["history"], beta)
        selected = jax.random.uniform(key, losses.shape) < chance
        count = jnp.maximum(jnp.sum(selected), 1)
        return selected.astype(jnp.float32) * (len(losses) / count)

    def record(
        state: State, numbers: jax.Array, losses: jax.Array, step: jax.Array
    ) -> State:
        del numbers, step
        latest = losses[-history:]
        places = (state["next"] + jnp.arange(len(latest))) % history
        return {
            "history": state["history"].at[places].set(latest),
            "next": (state["next"] + len(latest)) % history,
        }

    return Selection(init=init, weigh=weigh, record=record)


@register("proxy")
def proxy(*, keep: float = 0.5, network: str | None = None) -> Selection:
    """Trains on the `int(keep n)` records of a batch that a network finds the hardest.

    Unlike `ohem` it decides before the learner and its teachers run: they see the kept
    records alone, so that a step costs less. With a small network trained by an earlier
    stage this is the selection by a proxy of the airbench96 recipe (Jordan, 2024),
    where the proxy decides while it is being trained itself; here it has been.

    Args:
      keep: share of every batch, in (0, 1].
      network: whose cross-entropy decides: a network that an earlier stage trained. By
        default the learner itself, in evaluation mode.

    Raises:
      ValueError: keep is outside (0, 1], or leaves no record of a batch.
    """
    _check_share("keep", keep)

    def init(key: jax.Array, data: SelectionData) -> State:
        del key
        _kept("keep", keep, data.batch_size)
        return {}

    def choose(scores: jax.Array) -> jax.Array:
        return hardest(scores, _kept("keep", keep, len(scores)))

    return Selection(init=init, keep=choose, scorer=network)


@register("loss_rank")
def loss_rank(
    *, pressure: float = 100.0, end_pressure: float = 1.0, every_epochs: int = 1
) -> Selection:
    """Records are drawn by the rank of their last known loss.

    The first epoch visits every record once. Then, every `every_epochs` epochs, records
    are ranked anew and those of the next epochs are drawn with replacement by
    `loss_rank_probability`; the pressure falls geometrically from `pressure` in the
    second epoch to `end_pressure` in the last.

    Args:
      pressure: how much likelier the hardest record is than the easiest, at least 1.
      end_pressure: the same in the last epoch; 1 draws all alike.
      every_epochs: epochs between rankings.

    Raises:
      ValueError: an argument is below 1.

    Reference: Loshchilov and Hutter, 2015 (arXiv 1511.06343).
    """
    for name, value in (("pressure", pressure), ("end_pressure", end_pressure)):
        if not 1 <= value < math.inf:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if every_epochs < 1:
        raise ValueError(f"every_epochs must be at least 1, got {every_epochs}")

    def init(key: jax.Array, data: SelectionData) -> State:
        numbers = jax.random.permutation(key, jnp.arange(data.records, dtype=jnp.int32))
        first = numbers[: data.steps_per_epoch * data.batch_size]
        shape = (data.steps_per_epoch, data.batch_size)
        return {
            "key": jax.random.key_data(jax.random.fold_in(key, 1)),
            # Records not seen yet are drawn first.
            "losses": jnp.full(data.records, jnp.inf, jnp.float32),
            "numbers": first.reshape(shape),
            "position": jnp.zeros((), jnp.int32),
            "epoch": jnp.zeros((), jnp.int32),
            "epochs": jnp.full((), data.epochs, jnp.int32),
            "chance": jnp.full(data.records, 1 / data.records, jnp.float32),
        }

    def pick(state: State) -> jax.Array:
        return state["numbers"][state["position"]]

    def upcoming(state: State) -> tuple[jax.Array, jax.Array]:
        steps = len(state["numbers"])
        left = steps - state["position"]
        return jnp.roll(state["numbers"], -state["position"], axis=0), left

    def next_epoch(state: State) -> State:
        epoch = state["epoch"] + 1
        # From 0 in the second epoch to 1 in the last.
        done = (epoch - 1) / jnp.maximum(state["epochs"] - 2, 1)
        now = pressure * (end_pressure / pressure) ** jnp.clip(done, 0.0, 1.0)
        ranked = loss_rank_probability(state["losses"], now)
        again = (epoch - 1) % every_epochs == 0
        chance = jnp.where(again, ranked, state["chance"])
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), epoch)
        shape = state["numbers"].shape
        drawn = jax.random.choice(key, len(chance), shape, replace=True, p=chance)
        return {
            **state,
            "numbers": drawn.astype(jnp.int32),
            "position": jnp.zeros((), jnp.int32),
            "epoch": epoch,
            "chance": chance,
        }

    def record(
        state: State, numbers: jax.Array, losses: jax.Array, step: jax.Array
    ) -> State:
        del step
        state = {
            **state,
            "losses": state["losses"].at[numbers].set(_comparable(losses)),
            "position": state["position"] + 1,
        }
        done = state["position"] == len(state["numbers"])
        return jax.lax.cond(done, next_epoch, lambda state: state, state)

    return Selection(init=init, pick=pick, upcoming=upcoming, record=record)


def _comparable(losses: jax.Array) -> jax.Array:
    """The losses, infinite where they are not numbers."""
    return jnp.where(jnp.isnan(losses), jnp.inf, losses)


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}")


def _kept(name: str, share: float, count: int) -> int:
    kept = int(share * count)
    if kept < 1:
        raise ValueError(
            f"{name} {share} of a batch of {count} leaves no record; take at least "
            f"{1 / count:.3g}, or larger batches"
        )
    return kept
