"""Where arrays live: the mesh, and the sharding of batches and states.

A mesh has the axes `data` and `fsdp`. Batches are split over both; large arrays of
the state are split over `fsdp` and everything else is replicated. Under `jax.jit` a
reduction over a sharded batch is global, so batch-norm statistics and batch-coupled
losses see the whole batch, whatever the number of devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")


def make_mesh(
    *, data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes `data` and `fsdp` over all (or the given) devices.

    Args:
      data: devices along `data`; -1 takes all that `fsdp` leaves.
      fsdp: devices along `fsdp`.
      devices: the devices to use; all by default.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    if data == -1:
        data = max(count // fsdp, 1)
    if data * fsdp != count:
        raise ValueError(
            f"data {data} x fsdp {fsdp} = {data * fsdp} devices wanted, {count} present"
        )
    return jax.make_mesh(
        (data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def array_sharding(shape: Sequence[int], mesh: Mesh, *, min_size: int) -> NamedSharding:
    """The sharding of one array of the state.

    The largest axis that the `fsdp` size divides is split, if the array has at least
    `min_size` elements; otherwise the array is replicated. It depends on the shape
    alone, so a parameter, its gradient and its moments are split alike.
    """
    size = mesh.shape["fsdp"]
    if size == 1 or int(np.prod(shape)) < min_size:
        return replicated(mesh)
    for axis in sorted(range(len(shape)), key=lambda a: -shape[a]):
        if shape[axis] % size == 0:
            spec: list[str | None] = [None] * len(shape)
            spec[axis] = "fsdp"
            return NamedSharding(mesh, P(*spec))
    return replicated(mesh)


def state_sharding(abstract: Any, mesh: Mesh, *, min_size: int) -> Any:
    """The tree of shardings for a tree of abstract arrays."""
    return jax.tree.map(
        lambda leaf: array_sharding(leaf.shape, mesh, min_size=min_size), abstract
    )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a global batch on its devices."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, value)
        for key, value in batch.items()
    }


def check_batch_size(batch_size: int, mesh: Mesh, *, accumulate: int = 1) -> None:
    """Checks that a global batch splits evenly over the devices.

    Raises:
      ValueError: it does not; the message names the nearest sizes that do.
    """
    unit = mesh.size * accumulate
    if batch_size % unit:
        low = batch_size // unit * unit
        near = f"{low} or {low + unit}" if low else f"{unit}"
        parts = f"{mesh.size} devices" + (
            f" x {accumulate} micro-batches" if accumulate > 1 else ""
        )
        raise ValueError(f"{batch_size} does not split over {parts}; use {near}")
