"""Where the networks of a stage live, and how split ones are used.

Parameters that are split over `fsdp` are gathered where a network reads them, and their
gradients are scattered. Left to itself, the compiler may prefer to gather activations
when they are few, and then what is sent depends on the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkd.distill.method import Inputs, Method, Terms
from jaxkd.layers import Outputs
from jaxkd.layers.partition import Partition
from jaxkd.training.feeds import device_memory
from jaxkd.training.network import Network, Variables
from jaxkd.training.setup import Setup
from jaxkd.training.sharding import MODEL_AXIS, model_splits, state_sharding
from jaxkd.training.stage import Stage
from jaxkd.training.state import TrainState

# The share of a device's memory up to which "auto" keeps teachers whole on it. Weights
# that are only read have no gradients and no moments, and gathering them costs time at
# every step.
TEACHER_SHARE = 0.25


def teacher_sharding(
    variables: Sequence[Any],
    mesh: Mesh,
    *,
    mode: Literal["auto", "replicated", "sharded"],
    min_size: int,
    partitions: Sequence[Partition | None],
    copies: int = 1,
) -> tuple[Any, ...]:
    """The trees of shardings for the variables of a stage's teachers.

    What a teacher declares is split over `model` in any case.

    Args:
      variables: of each teacher, abstract or concrete.
      mesh: the devices.
      mode: "replicated" keeps whole teachers on every device; "sharded" splits their
        large arrays over `fsdp`, or over `data` where there is no `fsdp`; "auto"
        replicates them if all together take at most a quarter of a device's memory.
      min_size: elements from which an array is large.
      partitions: what each teacher declares.
      copies: how many of each teacher there are, one for every seed.

    Raises:
      ValueError: the axis `model` does not divide what a teacher declares.
    """
    splits = [
        model_splits(v["params"], p, mesh)
        for v, p in zip(variables, partitions, strict=True)
    ]

    def shardings(axis: str, min_size: float) -> tuple[Any, ...]:
        return tuple(
            state_sharding(v, mesh, min_size=min_size, splits=s, axis=axis)
            for v, s in zip(variables, splits, strict=True)
        )

    whole = shardings("fsdp", math.inf)
    if mode == "auto" and variables:
        room = TEACHER_SHARE * device_memory(mesh)
        fits = copies * bytes_per_device(tuple(variables), whole) <= room
        mode = "replicated" if fits else "sharded"
    if mode == "replicated" or not variables:
        return whole
    return shardings("fsdp" if mesh.shape["fsdp"] > 1 else "data", min_size)


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that a tree of arrays takes on each device.

    Args:
      tree: the arrays, abstract or concrete.
      shardings: the tree of their shardings.
    """

    def one(leaf: Any, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(one, tree, shardings)))


def place(
    setup: Setup, stage: Stage, variables: Mapping[str, Variables]
) -> tuple[Stage, tuple[Variables, ...]]:
    """Makes a stage ready for its mesh.

    Args:
      setup: the run.
      stage: the stage.
      variables: of its teachers, at least.

    Returns:
      The stage with networks and a method that gather what is split over `fsdp`; and
      the variables of its live teachers, where `MeshPlan.teacher` wants them.
    """
    live = tuple(variables[teacher.name] for teacher in stage.live_teachers)
    shapes = jax.eval_shape(lambda v: setup.seeds.each(v)[0], live)
    shardings = live_sharding(setup, stage, shapes)
    placed = gathering_stage(setup, stage, shardings)
    return placed, jax.device_put(live, setup.seeds.lift_sharding(shardings))


def live_sharding(setup: Setup, stage: Stage, shapes: Sequence[Any]) -> tuple[Any, ...]:
    """Where `MeshPlan.teacher` wants the variables of a stage's live teachers.

    Args:
      setup: the run.
      stage: the stage.
      shapes: of each live teacher's variables, for one seed.

    Returns:
      The tree of shardings of each, for one seed.
    """
    return teacher_sharding(
        shapes,
        setup.mesh,
        mode=setup.plan.mesh.teacher,
        min_size=setup.plan.mesh.fsdp_min_size,
        partitions=[teacher.partition for teacher in stage.live_teachers],
        copies=len(setup.seeds.seeds),
    )


def gathering_stage(setup: Setup, stage: Stage, shardings: Sequence[Any]) -> Stage:
    """The stage, whose networks and method gather what is split over `fsdp`.

    Args:
      setup: the run.
      stage: the stage.
      shardings: of its live teachers' variables, see `live_sharding`.
    """
    state = learner_sharding(setup, stage)
    pairs = zip(stage.live_teachers, shardings, strict=True)
    live = tuple(gathering(network, s["params"]) for network, s in pairs)
    return dataclasses.replace(
        stage.with_live(live),
        student=gathering(stage.student, state.params["network"]),
        method=_gathering_method(stage.method, state.params["method"]),
    )


def learner_sharding(setup: Setup, stage: Stage) -> TrainState:
    """The tree of shardings for the state of a stage, for one seed."""
    shapes = jax.eval_shape(stage.init_state, jax.random.key(0))
    network = shapes.params["network"]
    return state_sharding(
        shapes,
        setup.mesh,
        min_size=setup.plan.mesh.fsdp_min_size,
        splits=model_splits(network, stage.student.partition, setup.mesh),
    )


def gathering(network: Network, shardings: Any) -> Network:
    """The network, which gathers its split parameters before it uses them.

    Args:
      network: the network.
      shardings: of its `"params"`, as they are stored.
    """
    if _is_whole(shardings):
        return network

    def apply(
        variables: Variables,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None,
    ) -> tuple[Outputs, Variables]:
        params = jax.tree.map(_gather, variables["params"], shardings)
        variables = {**variables, "params": params}
        return network.apply(variables, images, train=train, key=key)

    return dataclasses.replace(network, apply=apply, freeze_norms=None)


def _gathering_method(method: Method, shardings: Any) -> Method:
    """The method, which gathers its split parameters before it uses them."""
    if _is_whole(shardings):
        return method

    def terms(params: Any, memory: Any, inputs: Inputs) -> tuple[Terms, Any]:
        return method.terms(jax.tree.map(_gather, params, shardings), memory, inputs)

    return dataclasses.replace(method, terms=terms)


def _is_whole(shardings: Any) -> bool:
    return all(s == _gathered(s) for s in jax.tree.leaves(shardings))


def _gathered(sharding: NamedSharding) -> NamedSharding:
    """The sharding over `model` alone, which computes on its parts."""
    spec = [axis if axis == MODEL_AXIS else None for axis in sharding.spec]
    return NamedSharding(sharding.mesh, P(*spec) if any(spec) else P())


def _gather(x: jax.Array, stored: NamedSharding) -> jax.Array:
    @jax.custom_vjp
    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, _gathered(stored))

    def forward(x: jax.Array) -> tuple[jax.Array, None]:
        return gather(x), None

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        return (jax.lax.with_sharding_constraint(gradient, stored),)

    gather.defvjp(forward, backward)
    return gather(x)
