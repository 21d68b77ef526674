"""The state before a stage's first step, its keys, and what a stage hands on."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxkd.distill.method import DataSpec, Method, Specs
from jaxkd.select import Selection
from jaxkd.training.network import Network, Variables
from jaxkd.training.selecting import selection_data
from jaxkd.training.state import TrainState
from jaxkd.training.wrappers import readout_variables

# Apart from the streams that a step draws from (see `step`).
SELECTION_STREAM = 2**32 - 3


def init_state(
    key: jax.Array,
    *,
    student: Network,
    method: Method,
    teachers: Sequence[Network],
    tx: optax.GradientTransformation,
    data: DataSpec,
    ema: float | None = None,
    variables: Variables | None = None,
    selection: Selection | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      key: the run's key. Networks of one architecture start equal for equal keys.
      student: the network that learns.
      method: how it learns.
      teachers: from whom.
      tx: the optimiser.
      data: what the method is told of the data.
      ema: whether to keep a running average (its decay is the step's matter).
      variables: the student's variables if an earlier stage trained it.
      selection: what chooses the records, if anything does.
    """
    init_key, method_key, run_key = _run_keys(key)
    # A copy if given: the state is donated, and others may still read the variables.
    initial: Variables = (
        student.init(init_key)
        if variables is None
        else jax.tree.map(jnp.copy, variables)
    )
    specs = Specs(
        student=student.spec, teachers=tuple(t.spec for t in teachers), data=data
    )
    method_params, memory = method.init(method_key, specs)
    params = {"network": initial["params"], "method": method_params}
    chosen = {}
    if selection is not None:
        stream = jax.random.fold_in(key, SELECTION_STREAM)
        chosen = selection.init(stream, selection_data(data))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=run_key,
        params=params,
        collections={k: v for k, v in initial.items() if k != "params"},
        opt_state=tx.init(params),
        memory=memory,
        # A copy: the average must not share buffers with params that are donated.
        average=None
        if ema is None
        else jax.tree.map(
            jnp.copy, {**initial, **readout_variables(method, method_params, memory)}
        ),
        selection=chosen,
    )


def _run_keys(key: jax.Array) -> jax.Array:
    """The keys of initialisation, of the method's own, and of `TrainState.key`."""
    return jax.random.split(key, 3)


def augmentation_key(key: jax.Array) -> jax.Array:
    """The key of the augmentation in every step of a stage.

    Args:
      key: what `init_state` was given.
    """
    return step_keys(_run_keys(key)[2])[0]


def step_keys(key: jax.Array) -> jax.Array:
    """The keys of the augmentation and of the rest of the step."""
    return jax.random.split(key)


def final_variables(state: TrainState, method: Method) -> Variables:
    """The variables that a stage hands on: the running average if there is one."""
    if state.average is not None:
        return state.average
    readout = readout_variables(method, state.params["method"], state.memory)
    return {**state.variables(), **readout}
