"""The smaller network that a trained one with closed channels is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from jaxkd.layers import Outputs
from jaxkd.sparsity.channels import Keep, find_channels, slice_variables
from jaxkd.sparsity.shrink import (
    close_channels,
    connected,
    open_channels,
    shrink,
    smaller,
)
from jaxkd.training.network import Network, Variables, spec_of


def shrunk(
    network: Network,
    variables: Variables,
    input_shape: Sequence[int],
    *,
    keep: Keep | None = None,
) -> tuple[Network, Variables]:
    """The network without its closed channels, see `jaxkd.sparsity.shrink`.

    It gives the same logits; taps of layers that became smaller have fewer channels.
    It trains as any other network; what was done to the larger one while it learned
    (masks and the like) is over.

    Args:
      network: the network, compressed or not.
      variables: of the network, concrete.
      input_shape: `(height, width, channels)` of its images.
      keep: which channels stay, the others are closed first; by default those that are
        not closed.

    Returns:
      The smaller network and its variables.

    Raises:
      ValueError: a compression adds layers to it, or `keep` does not fit it.
    """
    if network.upkeep is not None:
        plain, finalise = network.upkeep.plain, network.upkeep.finalise
        if plain is None or finalise is None:
            raise ValueError(
                f"the compression of {network.name!r} changes its layers; such a "
                "network cannot be made smaller"
            )
        variables, network = finalise(variables), plain
    whole = network

    def logits(variables: Variables, images: jax.Array) -> jax.Array:
        return whole.apply(variables, images, train=False, key=None)[0].logits

    channels = find_channels(whole.init, logits, input_shape)
    if keep is not None:
        variables = close_channels(channels, variables, keep)
    stay = open_channels(channels, variables) if keep is None else keep
    stay = connected(channels, stay, logits, variables, input_shape)
    small, _ = shrink(channels, variables, stay)

    def init(key: jax.Array) -> Variables:
        return slice_variables(channels, whole.init(key), stay)

    def apply(
        variables: Variables,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None,
    ) -> tuple[Outputs, Variables]:
        with smaller(channels, stay, train=train):
            return whole.apply(variables, images, train=train, key=key)

    made = dataclasses.replace(
        whole,
        init=init,
        apply=apply,
        spec=spec_of(whole.name, init, apply, input_shape),
        freeze_norms=None,
        partition=None,
        upkeep=None,
    )
    return made, small
