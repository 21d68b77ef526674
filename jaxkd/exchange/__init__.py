"""What devices send each other of their gradients, in place of a whole sum.

`dgc` sends the largest numbers, `powersgd` products of thin matrices, `quantized`
integers of few bits. Each runs on one device among several, in `jax.shard_map`, and
keeps what it did not send; `lgreco_ranks` tells how much to compress each layer.
"""

from jaxkd.exchange.base import Exchange, create, names, register
from jaxkd.exchange.lgreco import choose, lgreco_ranks
from jaxkd.exchange.lowrank import powersgd, with_ranks
from jaxkd.exchange.quantized import quantized
from jaxkd.exchange.topk import dgc, warmup

__all__ = [
    "Exchange",
    "choose",
    "create",
    "dgc",
    "lgreco_ranks",
    "names",
    "powersgd",
    "quantized",
    "register",
    "warmup",
    "with_ranks",
]
