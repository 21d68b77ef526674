"""Gradients of each device's own records, exchanged in fewer bytes than their sum.

`jax.jit` alone makes the compiler sum gradients over the devices. Here the loss and its
gradient run in `jax.shard_map`, so that every device has gradients of its own share of
the batch, and an `Exchange` makes one of them. What it remembers differs from device to
device: it lies in the optimiser's state with an axis of devices, split over `data`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxkd.exchange import Exchange
from jaxkd.training.state import TrainState

AXIS = "data"
_EXCHANGE = 2**32 - 4


class ExchangedState(NamedTuple):
    """The optimiser's state beside that of an exchange.

    Attributes:
      exchange: of each device, with an axis of devices before all others.
      optimizer: of the optimiser itself.
    """

    exchange: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class PerDevice:
    """An exchange and the devices that take part.

    Attributes:
      exchange: see `jaxkd.exchange`.
      mesh: the devices, all of them along `data`.

    Raises:
      ValueError: the mesh has other axes.
    """

    exchange: Exchange
    mesh: Mesh

    def __post_init__(self) -> None:
        """Checks the axes."""
        others = {n: s for n, s in self.mesh.shape.items() if n != AXIS and s > 1}
        if others:
            axes = " and ".join(f"{name} {size}" for name, size in others.items())
            raise ValueError(
                f"devices exchange gradients along {AXIS} alone, but the mesh has "
                f"{axes}; set config.mesh.fsdp and config.mesh.model to 1"
            )

    def optimizer(
        self, tx: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """The optimiser, whose state holds that of the exchange as well."""
        devices = self.mesh.shape[AXIS]

        def init(params: Any) -> ExchangedState:
            one = self.exchange.init(params)
            every = jax.tree.map(
                lambda x: jnp.broadcast_to(x, (devices, *x.shape)), one
            )
            return ExchangedState(exchange=every, optimizer=tx.init(params))

        def update(
            updates: Any, state: Any, params: Any = None
        ) -> tuple[Any, ExchangedState]:
            updates, own = tx.update(updates, state.optimizer, params)
            return updates, state._replace(optimizer=own)

        return optax.GradientTransformation(init, update)

    def gradients(
        self,
        value_and_grad: Callable[..., Any],
        state: TrainState,
        batch: Any,
        teacher_variables: Any,
        key: jax.Array,
    ) -> tuple[Any, ExchangedState]:
        """Computes gradients on every device, and exchanges them.

        Loss, means of terms and the network's other variables (batch-norm statistics)
        are averaged over the devices, of which each has an equal share of the batch.

        Args:
          value_and_grad: of `(state, batch, teacher_variables, key)`; returns
            `((loss, (means, share, collections, memory, losses)), gradients)`, of which
            share, memory and losses hold no arrays.
          state: before the step.
          batch: the global batch.
          teacher_variables: equal on all devices.
          key: each device draws from a key of its own.

        Returns:
          What `value_and_grad` returns, equal on all devices, and the optimiser's state
          after the exchange.
        """

        def mean(x: jax.Array) -> jax.Array:
            # Counters are equal on all devices.
            floating = jnp.issubdtype(x.dtype, jnp.floating)
            return jax.lax.pmean(x, AXIS) if floating else x

        def one(
            state: TrainState, before: Any, batch: Any, teachers: Any, key: jax.Array
        ) -> Any:
            key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
            values, own = value_and_grad(state, batch, teachers, key)
            gradients, after = self.exchange.update(
                own,
                jax.tree.map(lambda x: x[0], before),
                step=state.step,
                key=jax.random.fold_in(key, _EXCHANGE),
            )
            after = jax.tree.map(lambda x: x[None], after)
            return jax.tree.map(mean, values), gradients, after

        run = jax.shard_map(
            one,
            mesh=self.mesh,
            in_specs=(P(), P(AXIS), P(AXIS), P(), P()),
            out_specs=(P(), P(), P(AXIS)),
            # Otherwise gradients by replicated parameters would be summed at once.
            check_vma=False,
        )
        bare = dataclasses.replace(state, opt_state=None, average=None)
        before = state.opt_state
        values, gradients, after = run(
            bare, before.exchange, batch, teacher_variables, key
        )
        return (values, gradients), before._replace(exchange=after)
