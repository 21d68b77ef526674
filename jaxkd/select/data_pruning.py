"""Data pruning: a stage sees only the records that networks rated highest before it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxkd.select.registry import register
from jaxkd.select.samples import el2n, hardest
from jaxkd.select.selection import Selection, SelectionData, State


@register("prune")
def prune(*, raters: tuple[str, ...], keep: float = 0.5) -> Selection:
    """Trains on the `int(keep n)` records of the largest mean EL2N score.

    Every pass visits each of them once, in an order drawn anew; a stage has as many
    steps as it has without pruning, so it makes `1/keep` times as many passes.

    Args:
      raters: networks trained by earlier, short stages, several for a steadier score:
        a record's score is the mean of `el2n` over them.
      keep: share of the training records, in (0, 1].

    Raises:
      ValueError: keep is outside (0, 1], leaves less than one batch, or there are no
        raters.

    Reference: Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021
    (arXiv 2107.07075).
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, got {keep}")
    if not raters:
        raise ValueError("raters names no network, e.g. ('early_1', 'early_2')")

    def init(key: jax.Array, data: SelectionData) -> State:
        kept = int(keep * data.records)
        steps = kept // data.batch_size
        if steps < 1:
            raise ValueError(
                f"keep {keep} of {data.records} records leaves {kept}, less than a "
                f"batch of {data.batch_size}"
            )
        return {
            "key": jax.random.key_data(key),
            "kept": jnp.arange(kept, dtype=jnp.int32),
            "numbers": jnp.zeros((steps, data.batch_size), jnp.int32),
            "position": jnp.zeros((), jnp.int32),
            "passes": jnp.zeros((), jnp.int32),
            "records": jnp.full((), data.records, jnp.int32),
        }

    def draw(state: State) -> State:
        key = jax.random.wrap_key_data(state["key"])
        order = jax.random.permutation(
            jax.random.fold_in(key, state["passes"]), state["kept"]
        )
        numbers = state["numbers"]
        return {
            **state,
            "numbers": order[: numbers.size].reshape(numbers.shape),
            "position": jnp.zeros((), jnp.int32),
            "passes": state["passes"] + 1,
        }

    def begin(state: State, scores: jax.Array) -> State:
        return draw({**state, "kept": hardest(scores, len(state["kept"]))})

    def pick(state: State) -> jax.Array:
        return state["numbers"][state["position"]]

    def upcoming(state: State) -> tuple[jax.Array, jax.Array]:
        left = len(state["numbers"]) - state["position"]
        return jnp.roll(state["numbers"], -state["position"], axis=0), left

    def record(
        state: State, numbers: jax.Array, losses: jax.Array, step: jax.Array
    ) -> State:
        del numbers, losses, step
        state = {**state, "position": state["position"] + 1}
        done = state["position"] == len(state["numbers"])
        return jax.lax.cond(done, draw, lambda state: state, state)

    def facts(state: State) -> dict[str, jax.Array]:
        return {"data_used": len(state["kept"]) / state["records"]}

    return Selection(
        init=init,
        pick=pick,
        upcoming=upcoming,
        record=record,
        raters=tuple(raters),
        rate=el2n,
        begin=begin,
        facts=facts,
    )
