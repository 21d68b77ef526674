"""Which activations of a block the backward pass recomputes instead of keeping.

Rematerialisation goes block by block: a block whose input is kept is run again when the
backward pass reaches it, so that only one block's activations exist at a time. Done for
a whole network at once it would save nothing, as all of them would be recomputed first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import flax.linen as nn
import jax

Remat = bool | Literal["none", "blocks", "dots"]
"""What blocks keep for the backward pass.

`"none"` (or False): whatever it needs. `"dots"`: the results of convolutions, of matrix
products without batch axes, and of sums and maxima; norms, activations and attention
weights are recomputed. `"blocks"` (or True): the block's input alone.
"""

Block = TypeVar("Block", bound=Callable[..., Any])

KEPT = "dots"
"""The name under which `jax.ad_checkpoint.checkpoint_name` marks a result that "dots"
keeps although no single convolution or product computes it."""

_is_named = jax.checkpoint_policies.save_only_these_names(KEPT)
_REDUCTIONS = (jax.lax.reduce_sum_p, jax.lax.reduce_max_p)


def maybe_remat(block: Block, remat: Remat) -> Block:
    """The block class, with its activations recomputed as `remat` says.

    The block is called as `block(x, train)` with a static `train`.
    """
    if remat in (False, "none"):
        return block
    policy = keep_dots if remat == "dots" else None
    return nn.remat(block, static_argnums=(2,), policy=policy)  # type: ignore


def keep_dots(primitive: Any, *_: Any, **params: Any) -> bool:
    """The policy of "dots", for `jax.checkpoint`.

    Sums and maxima are the statistics of norms: next to nothing, but each would cost a
    pass over its operand.
    """
    if primitive is jax.lax.dot_general_p:
        _, (batch_axes, _) = params["dimension_numbers"]
        return not batch_axes
    if primitive is jax.lax.conv_general_dilated_p or primitive in _REDUCTIONS:
        return True
    return _is_named(primitive, **params)
