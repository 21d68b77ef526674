"""Selection: which records a step trains on, from losses that are known already."""

from jaxkd.select.data_pruning import prune
from jaxkd.select.mini_batches import hard_batches
from jaxkd.select.registry import create, names, register
from jaxkd.select.samples import (
    el2n,
    hardest,
    history_probability,
    loss_rank,
    loss_rank_probability,
    ohem,
    proxy,
    selective_backprop,
)
from jaxkd.select.selection import Selection, SelectionData

__all__ = [
    "Selection",
    "SelectionData",
    "create",
    "el2n",
    "hard_batches",
    "hardest",
    "history_probability",
    "loss_rank",
    "loss_rank_probability",
    "names",
    "ohem",
    "proxy",
    "prune",
    "register",
    "selective_backprop",
]
