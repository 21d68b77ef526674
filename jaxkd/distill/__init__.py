"""Methods: how a student learns, as values that compose.

`create("kd", temperature=4.0)` makes one, `weighted({"ce": 0.1, "kd": 0.9})` combines
several, and both give a `Method`: a pair of pure functions that the train step calls.
Each method is registered by the module that holds its recipe.
"""

from jaxkd.distill.method import (
    Batch,
    DataSpec,
    Inputs,
    Memory,
    Method,
    Params,
    Progress,
    Scheduled,
    Specs,
    Terms,
    Weight,
    compose,
    no_state,
    weight_at,
)
from jaxkd.distill.registry import create, names, register, weighted

__all__ = [
    "Batch",
    "DataSpec",
    "Inputs",
    "Memory",
    "Method",
    "Params",
    "Progress",
    "Scheduled",
    "Specs",
    "Terms",
    "Weight",
    "compose",
    "create",
    "names",
    "no_state",
    "register",
    "weight_at",
    "weighted",
]
