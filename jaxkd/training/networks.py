"""From the plan of a network to a `Network`, and what it costs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkd import compression, models
from jaxkd.analysis.costs import Costs, count_costs
from jaxkd.analysis.layer_costs import NetworkCosts, layer_costs, mask_densities
from jaxkd.registry import call_reference, is_reference, load_reference
from jaxkd.training import wrappers
from jaxkd.training.compressed import compressed
from jaxkd.training.network import Network, Variables, from_linen, from_nnx, spec_of
from jaxkd.training.plan import InputPlan, NetworkPlan
from jaxkd.training.schema import at

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_network(
    name: str,
    plan: NetworkPlan,
    *,
    input_shape: Sequence[int],
    num_classes: int,
    precision: str = "float32",
    remat: str = "none",
    normalisation: wrappers.Normalisation | None = None,
) -> Network:
    """Makes a network from its plan.

    Args:
      name: its name in the run.
      plan: its plan.
      input_shape: `(height, width, channels)` of the images that the run trains on.
      num_classes: of the data.
      precision: of the computation.
      remat: what the backward pass recomputes (see `jaxkd.layers.Remat`), unless the
        network's own option says otherwise.
      normalisation: `(mean, std)` of those images, None if they are not normalised.

    Raises:
      KeyError: no such network.
      ValueError, TypeError: options that do not fit.
    """
    own_shape = tuple(input_shape)
    if plan.input is not None and plan.input.image_size is not None:
        own_shape = (*plan.input.image_size, own_shape[-1])
    made = _make(plan, num_classes, precision, remat)
    if isinstance(made, nn.Module):
        network = from_linen(name, made, own_shape)
    elif isinstance(made, Network):
        network = _whole(name, made, own_shape)
    elif callable(made):
        network = from_nnx(name, made, own_shape)
    else:
        raise TypeError(
            f"{plan.name!r} must return a Linen module, a jaxkd Network or a function "
            f"of nnx.Rngs that makes an NNX module; got {type(made).__name__}"
        )
    if plan.compress:
        parts = {}
        for part, part_options in plan.compress.items():
            with at(f"config.networks.{name}.compress.{part}"):
                options = dict(part_options)
                parts[part] = compression.create(options.pop("name", part), **options)
        with at(f"config.networks.{name}.compress"):
            network = compressed(network, compression.chain(parts), own_shape)
    return _with_input(network, plan.input, normalisation, own_shape[-1])


def _whole(name: str, made: Network, shape: Sequence[int]) -> Network:
    """A user's network under its name in the run; it may have no variables at all."""

    def init(key: jax.Array) -> Variables:
        return {"params": {}, **made.init(key)}

    spec = spec_of(name, init, made.apply, shape)
    return dataclasses.replace(made, name=name, init=init, spec=spec)


def _make(plan: NetworkPlan, num_classes: int, precision: str, remat: str) -> Any:
    options = dict(plan.options)
    wanted = options.pop("num_classes", num_classes)
    if wanted != num_classes:
        raise ValueError(
            f"num_classes is {wanted} but the data have {num_classes} classes; "
            "leave num_classes out"
        )
    if "dtype" in options:
        raise ValueError("dtype is config.precision's matter; leave it out here")
    # A user's network need not know of remat or precision unless they are asked for.
    if remat != "none":
        options.setdefault("remat", remat)
    if is_reference(plan.name):
        if remat != "none" and not _takes(plan.name, "remat"):
            raise ValueError(
                f"config.train.remat is {remat!r}, but {plan.name!r} takes no option "
                "'remat'; give it one, or leave config.train.remat at 'none'"
            )
        if precision != "float32":
            options["dtype"] = _DTYPES[precision]
        return call_reference(plan.name, num_classes=num_classes, **options)
    return models.create(
        plan.name, num_classes=num_classes, dtype=_DTYPES[precision], **options
    )


def _takes(name: str, option: str) -> bool:
    """Whether the function that `name` refers to has a parameter for an option."""
    return option in inspect.signature(load_reference(name)).parameters


def _with_input(
    network: Network,
    plan: InputPlan | None,
    given: wrappers.Normalisation | None,
    channels: int,
) -> Network:
    if plan is None:
        return network

    if plan.mean is not None and len(plan.mean) not in (1, channels):
        raise ValueError(
            f"input.mean has {len(plan.mean)} values but images have {channels} "
            "channels"
        )

    def change(images: jax.Array) -> jax.Array:
        if plan.image_size is not None:
            images = wrappers.resized(images, plan.image_size)
        if plan.mean is not None and plan.std is not None:
            wanted = (plan.mean, plan.std)
            images = wrappers.renormalise(images, given=given, wanted=wanted)
        return images

    return wrappers.with_images(network, change)


def network_costs(
    network: Network, variables: Variables, shape: Sequence[int]
) -> Costs:
    """Costs of a network for one image in evaluation, its readout included.

    Args:
      network: the network.
      variables: its variables, concrete or abstract.
      shape: `(height, width, channels)` of the image.
    """
    trained = [variables["params"]]
    if wrappers.READOUT in variables:
        trained.append(variables[wrappers.READOUT]["params"])

    def logits(variables: Variables, images: jax.Array) -> jax.Array:
        return network.apply(variables, images, train=False, key=None)[0].logits

    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    macs = count_costs(logits, variables, images).macs
    return Costs(macs=macs, params=sum(x.size for x in jax.tree.leaves(trained)))


def costs_of(
    network: Network, variables: Variables, shape: Sequence[int]
) -> NetworkCosts:
    """Costs of a network for one image in evaluation, masks taken into account.

    Args:
      network: the network.
      variables: its variables; concrete if the network is masked.
      shape: `(height, width, channels)` of the image.
    """
    densities = {}
    upkeep = network.upkeep
    if upkeep is not None:
        densities = mask_densities(upkeep.masks(variables))
        if upkeep.plain is not None and upkeep.finalise is not None:
            # Masks are applied once and for all, and are no activations.
            network, variables = upkeep.plain, upkeep.finalise(variables)
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    def logits(variables: Any, images: jax.Array) -> jax.Array:
        return network.apply(variables, images, train=False, key=None)[0].logits

    return layer_costs(logits, variables, images, densities=densities)
