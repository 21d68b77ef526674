"""Smaller networks from networks with closed channels.

A channel is *closed* if its kernel column and bias are zero and so are the scale and
bias of every norm, and the bias of every depthwise convolution, that it goes through.
Then it is zero after the norm, stays zero through every activation with f(0) = 0 (ReLU,
ReLU6, GELU, Swish) and every pooling, and adds nothing to what reads it. So the network
without the channel computes the same numbers. A masked kernel column alone is not
enough: a norm would make the constant `bias - mean * scale / sqrt(var)` of it, which
the padding of the next convolution turns into something that is no constant.
`close_channels` therefore zeroes all of it, which changes the function unless the
network learned with closed channels, as it does by `lapp` and by `pdp` with
`structure="channel"`.

What is left is a network with smaller arrays, run within `smaller`, and it is faster on
any hardware; masks of single weights are not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.sparsity.channels import (
    Channels,
    Keep,
    Logits,
    Variables,
    is_connected,
    sized,
    slice_variables,
)


def open_channels(channels: Channels, variables: Variables) -> dict[str, np.ndarray]:
    """Which output channels of the free layers are not closed.

    Args:
      channels: of the network.
      variables: of the network, concrete.

    Returns:
      Bool `[features]` by the layer's path; at least one is set, closed or not.
    """
    found = {}
    for path in channels.free:
        index = channels.layers.index(path)
        is_open = np.zeros(channels.sites[path].features, bool)
        for x in _parameters(variables, path).values():
            is_open |= _by_output(x) != 0
        for site in _passed(channels, path):
            width = site.features // len(site.owner)
            for name, x in _parameters(variables, site.path).items():
                if name == "kernel":
                    continue  # of a depthwise convolution, which reads zeros
                used = (_by_output(x) != 0).reshape(-1, width).any(-1)
                mine = site.owner == index
                np.logical_or.at(is_open, site.channel[mine], used[mine])
        if not is_open.any():
            is_open[0] = True
        found[path] = is_open
    return found


def close_channels(channels: Channels, variables: Variables, keep: Keep) -> Variables:
    """The variables in their shapes, with all channels closed that do not stay.

    Args:
      channels: of the network.
      variables: of the network.
      keep: which channels of free layers stay, bool `[features]` by the layer's path.

    Raises:
      ValueError: a layer is not free, or a mask does not fit it or keeps nothing.
    """
    channels.check(keep)
    stays = {path: channels.writing(path, keep) for path in channels.sites}

    def cut(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        *scope, _ = (str(getattr(k, "key", k)) for k in path)
        stay = stays.get("/".join(scope))
        if stay is None or stay.all():
            return x
        row = jnp.asarray(stay).reshape((1,) * (x.ndim - 1) + (-1,))
        return jnp.where(row, x, jnp.zeros((), x.dtype))

    params = jax.tree.map_with_path(cut, variables["params"])
    return {**variables, "params": params}


def shrink(
    channels: Channels, variables: Variables, keep: Keep | None = None
) -> tuple[Variables, dict[str, np.ndarray]]:
    """The variables without the channels that do not stay, smaller arrays.

    Args:
      channels: of the network.
      variables: of the network, concrete.
      keep: which channels stay; by default all that are not closed. Channels that are
        taken away though they are not closed change the outputs.

    Returns:
      The variables, and which channels stay: `smaller` runs the network with them.

    Raises:
      ValueError: a layer is not free, or a mask does not fit it or keeps nothing.
    """
    stay = open_channels(channels, variables) if keep is None else dict(keep)
    channels.check(stay)
    return slice_variables(channels, variables, stay), stay


def smaller(
    channels: Channels, keep: Keep, *, train: bool = False
) -> contextlib.AbstractContextManager[Any]:
    """The context in which a network has the channels that stay, and no others.

    Args:
      channels: of the whole network.
      keep: which channels stay, as `shrink` returned it.
      train: the mode in which the network is run.

    A function that was jitted and called outside remembers the sizes of then: jit a new
    one. Example: `with smaller(channels, keep): module.apply(variables, images)`.
    """
    return sized(channels.sizes(keep), train=train)


def connected(
    channels: Channels,
    keep: Keep,
    logits: Logits,
    variables: Variables,
    input_shape: Sequence[int],
) -> dict[str, np.ndarray]:
    """Which channels stay so that the network still connects them as before.

    A network may add a shortcut where two numbers of channels are equal, and channels
    that were taken away can make them so. Then layers with as few channels left as
    another layer has keep one more.

    Args:
      channels: of the whole network.
      keep: which channels are to stay.
      logits: of the whole network.
      variables: of the whole network, concrete or abstract.
      input_shape: `(height, width, channels)` of the images.

    Returns:
      `keep`, or with one more channel in some layers.

    Raises:
      ValueError: a layer is not free, a mask does not fit it or keeps nothing, or the
        network cannot be kept together.
    """
    channels.check(keep)
    stay = {path: np.array(kept) for path, kept in keep.items()}
    if is_connected(channels, stay, logits, variables, input_shape):
        return stay
    taken = {channels.sites[path].features for path in channels.layers}
    for kept in stay.values():
        if kept.sum() in taken and not kept.all():
            kept[np.flatnonzero(~kept)[0]] = True
    if is_connected(channels, stay, logits, variables, input_shape):
        return stay
    raise ValueError(
        "without these channels the network connects the others in another way; keep "
        "another number of channels in some of its layers"
    )


def _parameters(variables: Variables, path: str) -> dict[str, Any]:
    """The parameters of one layer by name."""
    scope = variables["params"]
    for name in path.split("/"):
        scope = scope[name]
    return {name: x for name, x in scope.items() if not isinstance(x, dict)}


def _by_output(x: Any) -> np.ndarray:
    """The largest absolute value of each output channel."""
    x = np.abs(np.asarray(x, np.float32))
    return x.reshape(-1, x.shape[-1]).max(0)


def _passed(channels: Channels, path: str) -> list[Any]:
    """The norms and depthwise convolutions that a layer's channels go through."""
    return [s for s in channels.readers(path) if s.kind in ("norm", "depthwise")]
