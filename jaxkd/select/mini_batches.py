"""Hard mini-batches: after one ordinary pass, train on the batches of largest loss.

The training set is cut into `b` mini-batches once. The first pass visits all of them
and notes the loss of each before its update. Every later pass visits the
`k = int(delta * b)` batches whose noted losses are the largest, in ascending order, and
notes their losses anew. Others keep what was noted, and come in again when those in
training fall below them. The steps of a stage are its epochs times `b` for every
`delta`, so that results compare at equal steps.

Reference: Sahayam, Zakkam, Jayaraman, "Can we learn better with hard samples?", 2023
(arXiv 2304.03486).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxkd.select.registry import register
from jaxkd.select.selection import Selection, SelectionData, State


@register("hard_batches")
def hard_batches(*, delta: float = 0.5, shuffle: bool = False) -> Selection:
    """Trains on the share `delta` of the mini-batches that last had the largest loss.

    Equal losses keep the order that the last pass left them in. A loss that is not a
    number counts as the largest. The loss of a batch is that of the whole method, so a
    distilled student selects by what it is taught.

    Args:
      delta: in (0, 1]; 1 visits every batch in every pass, which is ordinary training
        on fixed batches.
      shuffle: draws the mini-batches at random at the start of the stage. As published,
        they are consecutive records.

    Raises:
      ValueError: delta is outside (0, 1], or so small that no batch is left.
    """
    if not 0 < delta <= 1:
        raise ValueError(f"delta must be above 0 and at most 1, got {delta}")

    def init(key: jax.Array, data: SelectionData) -> State:
        batches = data.records // data.batch_size
        kept = int(delta * batches)
        if kept < 1:
            raise ValueError(
                f"delta {delta} of {batches} batches leaves none; take at least "
                f"{1 / max(batches, 1):.3g}, or smaller batches"
            )
        numbers = jnp.arange(data.records, dtype=jnp.int32)
        if shuffle:
            numbers = jax.random.permutation(key, numbers)
        order = jnp.arange(batches, dtype=jnp.int32)
        return {
            "numbers": numbers[: batches * data.batch_size].reshape(batches, -1),
            "losses": jnp.zeros(batches, jnp.float32),
            # All batches as the last pass sorted them, the largest loss first.
            "order": order,
            # What this pass visits: the first `length` of them, from `position` on.
            "visits": order,
            "position": jnp.zeros((), jnp.int32),
            "length": jnp.full((), batches, jnp.int32),
            # Of this epoch, which is `b` steps.
            "used": jnp.zeros(batches, bool),
        }

    def pick(state: State) -> jax.Array:
        return state["numbers"][state["visits"][state["position"]]]

    def upcoming(state: State) -> tuple[jax.Array, jax.Array]:
        visits = jnp.roll(state["visits"], -state["position"])
        return state["numbers"][visits], state["length"] - state["position"]

    def next_pass(state: State) -> State:
        batches = len(state["order"])
        kept = int(delta * batches)
        losses = jnp.where(jnp.isnan(state["losses"]), jnp.inf, state["losses"])
        ranks = jnp.argsort(losses[state["order"]], stable=True, descending=True)
        order = state["order"][ranks]
        # Batches beyond the first `kept` sort behind them.
        places = jnp.where(jnp.arange(batches) < kept, order, batches)
        visits = jnp.minimum(jnp.sort(places), batches - 1)
        return {
            **state,
            "order": order,
            "visits": visits,
            "position": jnp.zeros((), jnp.int32),
            "length": jnp.full((), kept, jnp.int32),
        }

    def record(
        state: State, numbers: jax.Array, losses: jax.Array, step: jax.Array
    ) -> State:
        del numbers
        batch = state["visits"][state["position"]]
        fresh = step % len(state["order"]) == 0
        used = jnp.where(fresh, jnp.zeros_like(state["used"]), state["used"])
        state = {
            **state,
            "losses": state["losses"].at[batch].set(jnp.mean(losses)),
            "position": state["position"] + 1,
            "used": used.at[batch].set(True),
        }
        done = state["position"] == state["length"]
        return jax.lax.cond(done, next_pass, lambda state: state, state)

    def facts(state: State) -> dict[str, jax.Array]:
        return {"data_used": jnp.mean(state["used"].astype(jnp.float32))}

    return Selection(
        init=init, pick=pick, upcoming=upcoming, record=record, facts=facts
    )
