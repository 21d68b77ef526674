"""Networks that are made small while they learn: a `Network` from a `Network`.

What a compression trains lies among the network's parameters and what it remembers
among its other variables, both under the name "compression"; so checkpoints, averages,
evaluation and later stages need not know of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxkd.compression import (
    After,
    Arrays,
    Compression,
    apply_masks,
    flatten,
    unflatten,
)
from jaxkd.layers import Outputs
from jaxkd.training.network import ApplyFn, Network, Upkeep, Variables, spec_of

COMPRESSION = "compression"


def compressed(
    network: Network, compression: Compression, input_shape: tuple[int, ...]
) -> Network:
    """The network, made small by a compression while it learns.

    Args:
      network: any network.
      compression: see `jaxkd.compression`.
      input_shape: `(height, width, channels)` of the images.

    Raises:
      ValueError: the compression finds nothing to compress, or cannot.
    """
    if compression.fit is not None:

        def logits(variables: Variables, images: jax.Array) -> jax.Array:
            return network.apply(variables, images, train=False, key=None)[0].logits

        compression = compression.fit(network.init, logits, tuple(input_shape))

    def layers(train: bool) -> contextlib.AbstractContextManager[Any]:
        make = compression.layers
        return contextlib.nullcontext() if make is None else make(train)

    def prepared(key: jax.Array, variables: Variables) -> Variables:
        """Variables of the network itself with those of the compression, anew."""
        own, _, _ = split(variables)
        params = flatten(own["params"])
        learned, state = compression.init(jax.random.fold_in(key, 1), params)
        params = apply_masks(params, compression.masks(state))
        return joined({**own, "params": unflatten(params, own["params"])},
                      learned, state)  # fmt: skip

    def init(key: jax.Array) -> Variables:
        with layers(False):
            variables = network.init(key)
        return prepared(key, variables)

    def wrap(run: ApplyFn) -> ApplyFn:
        def apply(
            variables: Variables,
            images: jax.Array,
            *,
            train: bool,
            key: jax.Array | None,
        ) -> tuple[Outputs, Variables]:
            own, learned, state = split(variables)
            params = compression.effective(learned, state, flatten(own["params"]))
            own = {**own, "params": unflatten(params, own["params"])}
            with layers(train):
                outputs, collections = run(own, images, train=train, key=key)
            if COMPRESSION in variables:
                collections = {**collections, COMPRESSION: state}
            return outputs, collections

        return apply

    def update(variables: Variables, gradients: Any, **told: Any) -> Variables:
        own, learned, state = split(variables)
        dense, _, _ = split({"params": gradients})
        after = After(
            params=flatten(own["params"]), gradients=flatten(dense["params"]), **told
        )
        params, state = compression.update(learned, state, after)
        params = apply_masks(params, compression.masks(state))
        return joined(
            {**own, "params": unflatten(params, own["params"])}, learned, state
        )

    def values(of: Callable[..., Arrays]) -> Callable[[Variables], Arrays]:
        def read(variables: Variables) -> Arrays:
            own, learned, state = split(variables)
            return of(learned, state, flatten(own["params"]))

        return read

    def masks(variables: Variables) -> Any:
        own, learned, state = split(variables)
        found = compression.masks(state)
        every = jnp.ones((), bool)
        params = {path: found.get(path, every) for path in flatten(own["params"])}
        tree = unflatten(params, own["params"])
        if learned:
            tree[COMPRESSION] = {path: every for path in learned}
        return tree

    def finalise(variables: Variables) -> Variables:
        own, learned, state = split(variables)
        params = compression.final(learned, state, flatten(own["params"]))
        return {**own, "params": unflatten(params, own["params"])}

    freeze = network.freeze_norms
    apply = wrap(network.apply)
    return dataclasses.replace(
        network,
        init=init,
        apply=apply,
        spec=spec_of(network.name, init, apply, input_shape),
        freeze_norms=None if freeze is None else lambda p: wrap(freeze(p)),
        # A rule may give layers other sizes than the partition knows.
        partition=network.partition if compression.layers is None else None,
        upkeep=Upkeep(
            masks=masks,
            update=update,
            terms=values(compression.terms),
            weights=dict(compression.weights),
            facts=values(compression.facts),
            restart=prepared,
            # What a rule of layers adds is no part of the plain network.
            finalise=finalise if compression.layers is None else None,
            plain=network if compression.layers is None else None,
        ),
    )


def split(variables: Variables) -> tuple[Variables, Arrays, Any]:
    """The network's own variables, what its compression learns, and remembers."""
    own = {name: x for name, x in variables.items() if name != COMPRESSION}
    params = dict(own["params"])
    learned = params.pop(COMPRESSION, {})
    return {**own, "params": params}, learned, variables.get(COMPRESSION, {})


def joined(own: Variables, learned: Arrays, state: Any) -> Variables:
    """The variables of a compressed network from their three parts."""
    params = {**own["params"], **({COMPRESSION: learned} if learned else {})}
    # An empty tree would not survive a checkpoint.
    rest = {COMPRESSION: state} if jax.tree.leaves(state) else {}
    return {**own, "params": params, **rest}


def masked_tree(tree: Any, masks: Any) -> Any:
    """The arrays, zero where their masks are not set."""
    return jax.tree.map(
        lambda x, mask: jnp.where(mask, x, jnp.zeros((), x.dtype)), tree, masks
    )


def mask_moments(
    tx: optax.GradientTransformation, opt_state: Any, params: Any, masks: Any
) -> Any:
    """What the optimiser remembers of the network's parameters, masked."""
    every = jnp.ones((), bool)
    trees = {**jax.tree.map(lambda _: every, params), "network": masks}
    return optax.tree.map_params(
        tx,
        lambda x, mask: jnp.where(mask, x, jnp.zeros((), x.dtype)),
        opt_state,
        trees,
    )
