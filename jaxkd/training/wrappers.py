"""Networks made of networks: several that learn together, other inputs, other readouts.

Each function takes a `Network` and returns a `Network`, so that the step and the loop
need not know what is inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.distill.method import Method
from jaxkd.layers import Outputs
from jaxkd.layers.partition import joined
from jaxkd.numerics import resize_bilinear
from jaxkd.training.network import Network, Upkeep, Variables, spec_of

READOUT = "readout"
Normalisation = tuple[Sequence[float], Sequence[float]]


def join(networks: Sequence[Network], input_shape: Sequence[int]) -> Network:
    """Makes one network of several that learn together on the same images.

    Its outputs are those of the first, with the others as `peers`. Every collection of
    its variables is a dict by the members' names; `member` takes one out.

    Args:
      networks: the members.
      input_shape: `(height, width, channels)` of the images.
    """
    names = [network.name for network in networks]

    def init(key: jax.Array) -> Variables:
        # Equal networks must differ, or they would stay equal for ever; the first
        # starts as it would alone.
        keys = [key, *(jax.random.fold_in(key, i) for i in range(1, len(networks)))]
        parts = {
            network.name: network.init(k)
            for network, k in zip(networks, keys, strict=True)
        }
        return _by_collection(parts)

    def apply(
        variables: Variables,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None,
    ) -> tuple[Outputs, Variables]:
        outputs, collections = [], {}
        for i, network in enumerate(networks):
            own_key = None if key is None else jax.random.fold_in(key, i)
            result, collections[network.name] = network.apply(
                member(variables, network.name), images, train=train, key=own_key
            )
            outputs.append(result)
        first = dataclasses.replace(outputs[0], peers=tuple(outputs[1:]))
        return first, _by_collection(collections)

    name = "+".join(names)
    return Network(
        name,
        init,
        apply,
        spec_of(name, init, apply, input_shape),
        partition=joined({n.name: n.partition for n in networks}),
        upkeep=_joined_upkeep(networks),
    )


def _joined_upkeep(networks: Sequence[Network]) -> Upkeep | None:
    """Each member's upkeep of its own variables."""
    kept = {n.name: n.upkeep for n in networks if n.upkeep is not None}
    if not kept:
        return None

    def masks(variables: Variables) -> Any:
        every = jnp.ones((), bool)
        return {
            name: kept[name].masks(member(variables, name))
            if name in kept
            else jax.tree.map(lambda _: every, params)
            for name, params in variables["params"].items()
        }

    def update(variables: Variables, gradients: Any, **told: Any) -> Variables:
        parts = {name: member(variables, name) for name in variables["params"]}
        for i, (name, upkeep) in enumerate(kept.items()):
            own = {**told, "key": jax.random.fold_in(told["key"], i)}
            parts[name] = upkeep.update(parts[name], gradients[name], **own)
        return gather(parts)

    def values(kind: str) -> Callable[[Variables], dict[str, jax.Array]]:
        return lambda variables: {
            f"{name}/{key}": value
            for name, upkeep in kept.items()
            for key, value in getattr(upkeep, kind)(member(variables, name)).items()
        }

    def restart(key: jax.Array, variables: Variables) -> Variables:
        parts = {name: member(variables, name) for name in variables["params"]}
        for i, (name, upkeep) in enumerate(kept.items()):
            parts[name] = upkeep.restart(jax.random.fold_in(key, i), parts[name])
        return gather(parts)

    return Upkeep(
        masks=masks,
        update=update,
        terms=values("terms"),
        weights={
            f"{name}/{key}": weight
            for name, upkeep in kept.items()
            for key, weight in upkeep.weights.items()
        },
        facts=values("facts"),
        restart=restart,
    )


def member(variables: Variables, name: str) -> Variables:
    """The variables of one member of joined networks."""
    return {kind: parts[name] for kind, parts in variables.items() if name in parts}


def gather(parts: dict[str, Variables]) -> Variables:
    """The variables of joined networks from those of their members, by name."""
    return _by_collection(parts)


def _by_collection(parts: dict[str, Variables]) -> Variables:
    kinds = dict.fromkeys(kind for part in parts.values() for kind in part)
    return {
        kind: {name: part[kind] for name, part in parts.items() if kind in part}
        for kind in kinds
    }


def with_images(network: Network, change: Callable[[jax.Array], jax.Array]) -> Network:
    """The network on images that are changed first.

    The change must keep the shapes of the network's outputs, or the network must have
    been made for the changed shape.
    """

    def apply(
        variables: Variables,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None,
    ) -> tuple[Outputs, Variables]:
        return network.apply(variables, change(images), train=train, key=key)

    return dataclasses.replace(network, apply=apply, freeze_norms=None)


def renormalise(
    images: jax.Array,
    *,
    given: Normalisation | None,
    wanted: Normalisation,
) -> jax.Array:
    """Images normalised by other means and standard deviations.

    Args:
      images: `[batch, height, width, channels]`, normalised by `given`.
      given: `(mean, std)` of the images as they come; None: not normalised.
      wanted: `(mean, std)` that the network was trained with.
    """

    def row(values: Sequence[float]) -> jax.Array:
        return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)

    if given is not None:
        images = images * row(given[1]) + row(given[0])
    return (images - row(wanted[0])) / row(wanted[1])


def resized(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Images at another resolution; bilinear, half-pixel centres, no antialiasing."""
    return images if images.shape[1:3] == size else resize_bilinear(images, size)


def with_readout(network: Network, method: Method) -> Network:
    """The network that predicts through a method's params, once they are trained.

    Where the variables hold the collection `"readout"` (see `readout_variables`), the
    logits are the method's; otherwise the network's own. The learner of the stage
    itself is not wrapped: it is trained by its own logits and taps.
    """
    readout = method.readout
    if readout is None:
        return network

    def apply(
        variables: Variables,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None,
    ) -> tuple[Outputs, Variables]:
        own = without_readout(variables)
        outputs, collections = network.apply(own, images, train=train, key=key)
        if READOUT not in variables:
            return outputs, collections
        state = variables[READOUT]
        logits = readout(state["params"], state["memory"], outputs)
        # The head belongs to the network's own logits.
        outputs = dataclasses.replace(outputs, logits=logits, head=None)
        return outputs, {**collections, READOUT: state}

    return dataclasses.replace(network, apply=apply)


def readout_variables(method: Method, params: Any, memory: Any) -> Variables:
    """What a trained method adds to the variables of its student.

    Of a composed method this is the state of the part that predicts, and no other's.
    """
    if method.readout is None:
        return {}
    for part in method.readout_path:
        params, memory = params[part], memory[part]
    return {READOUT: {"params": params, "memory": memory}}


def without_readout(variables: Variables) -> Variables:
    """The network's own variables."""
    return {kind: tree for kind, tree in variables.items() if kind != READOUT}
