"""Where arrays live: the mesh, and the sharding of batches and states.

A mesh has the axes `data`, `fsdp` and `model`. Batches are split over the first two and
repeated along the third. Large arrays of the state are split over `fsdp`; parameters
that their network declares (`jaxkd.layers.Partition`) are split over `model`, so that
each device computes a part of a layer; everything else is replicated. Under `jax.jit` a
reduction over a sharded batch is global, so batch-norm statistics and batch-coupled
losses see the whole batch, whatever the number of devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkd.layers.partition import Partition, Spec
from jaxkd.training.paths import path_name

BATCH_AXES = ("data", "fsdp")
# What each device remembers of an exchange of gradients, with an axis of devices first.
_OF_EACH_DEVICE = "opt_state/exchange/"
MODEL_AXIS = "model"


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    model: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `model` over all (or the given) devices.

    Neighbours along `model` are neighbours in the machine, as they talk most: on the
    TPUs of one slice JAX lays the axes along the links; elsewhere the devices of a
    slice (with GPUs a host is one), and then those of a process, follow each other.

    Args:
      data: devices along `data`; -1 takes all that the others leave.
      fsdp: devices along `fsdp`.
      model: devices along `model`.
      devices: the devices to use; all by default.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or they do not fit
        the links of a TPU slice.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    if data == -1:
        data = max(count // (fsdp * model), 1)
    if data * fsdp * model != count:
        raise ValueError(
            f"data {data} x fsdp {fsdp} x model {model} = {data * fsdp * model} "
            f"devices wanted, {count} present; leave data at -1 and take fsdp x model "
            f"from the divisors of {count}"
        )
    shape, names = (data, fsdp, model), (*BATCH_AXES, MODEL_AXIS)
    types = (AxisType.Auto,) * 3
    if not one_tpu_slice(devices):
        # `jax.make_mesh` refuses devices of several slices, and XLA takes every host
        # with GPUs for a slice.
        return Mesh(np.array(in_order(devices)).reshape(shape), names, axis_types=types)
    try:
        return jax.make_mesh(shape, names, axis_types=types, devices=devices)
    except NotImplementedError as error:
        raise ValueError(
            f"data {data} x fsdp {fsdp} x model {model} does not fit the links of "
            f"{_extent(devices)}; let each of them be 1, one of these lengths or a "
            "product of some, e.g. leave data at -1 and take fsdp and model 1"
        ) from error


def one_tpu_slice(devices: Sequence[Any]) -> bool:
    """Whether all devices are TPUs of one slice, whose links JAX knows."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    return all(device.platform == "tpu" for device in devices) and len(slices) == 1


def in_order(devices: Sequence[Any]) -> list[Any]:
    """The devices, so that those of a slice, and of a process in it, are neighbours."""
    return sorted(
        devices, key=lambda d: (getattr(d, "slice_index", 0), d.process_index, d.id)
    )


def _extent(devices: Sequence[Any]) -> str:
    """How many TPUs stand along each direction, in words."""
    lengths = [len(set(c)) for c in zip(*(d.coords for d in devices), strict=True)]
    cores = len(devices) // math.prod(lengths)
    return " x ".join(map(str, [*lengths, *([cores] if cores > 1 else [])])) + " TPUs"


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


# ------------------------------------------------------------------------------ batches


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """The batch axis, which comes after `leading` others, over `data` and `fsdp`."""
    return NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, *, leading: int = 0
) -> dict[str, jax.Array]:
    """Puts this process's part of a global batch on its devices.

    Args:
      batch: the arrays, `[*leading, batch, ...]`.
      mesh: the devices.
      leading: how many axes come before the batch.
    """
    sharding = batch_sharding(mesh, leading=leading)
    return {
        key: jax.make_array_from_process_local_data(sharding, value)
        for key, value in batch.items()
    }


def process_part(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads: `(index, count)`.

    Processes have parts of their own, unless the axis `model` goes across processes:
    then those along it read the same records.

    Raises:
      ValueError: processes would need overlapping parts.
    """
    parts = batch_parts(mesh)
    rows: dict[int, set[int]] = {}
    positions = batch_sharding(mesh).devices_indices_map((parts,))
    for device, (row,) in positions.items():
        rows.setdefault(device.process_index, set()).add(row.start or 0)
    distinct = sorted({tuple(sorted(r)) for r in rows.values()})
    if sum(map(len, distinct)) != parts or len({len(r) for r in distinct}) > 1:
        axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        raise ValueError(
            f"{axes} would give processes unequal or overlapping parts of a batch; "
            f"take {MODEL_AXIS} from the divisors or multiples of a process's devices"
        )
    own = tuple(sorted(rows[jax.process_index()]))
    return distinct.index(own), len(distinct)


def check_batch_size(batch_size: int, mesh: Mesh, *, accumulate: int = 1) -> None:
    """Checks that a global batch splits evenly over the devices.

    Raises:
      ValueError: it does not; the message names the nearest sizes that do.
    """
    unit = batch_parts(mesh) * accumulate
    if batch_size % unit:
        low = batch_size // unit * unit
        near = f"{low} or {low + unit}" if low else f"{unit}"
        parts = f"{batch_parts(mesh)} devices"
        if mesh.shape[MODEL_AXIS] > 1:
            parts = (
                f"{batch_parts(mesh)} groups of {mesh.shape[MODEL_AXIS]} devices "
                "(data x fsdp)"
            )
        if accumulate > 1:
            parts += f" x {accumulate} micro-batches"
        raise ValueError(f"{batch_size} does not split over {parts}; use {near}")


# ------------------------------------------------------------------------------- states


@dataclasses.dataclass(frozen=True)
class Split:
    """The shape of a parameter, and along which axes it is split over `model`."""

    shape: tuple[int, ...]
    spec: Spec


def model_splits(
    params: Any, partition: Partition | None, mesh: Mesh
) -> dict[str, Split]:
    """The parameters that are split over `model`, by their paths.

    Args:
      params: a network's `"params"`, abstract or concrete.
      partition: what the network declares; None if nothing.
      mesh: the devices.

    Raises:
      ValueError: the axis does not divide what is split; the message says into what it
        can be split.
    """
    size = mesh.shape[MODEL_AXIS]
    if partition is None or size == 1:
        return {}
    for unit, count in partition.units.items():
        if count % size:
            able = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise ValueError(f"{count} {unit} do not split over {size}; use {able}")
    splits = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        name = path_name(path)
        spec = partition.spec(name)
        if not spec:
            continue
        if len(spec) != len(leaf.shape):
            raise ValueError(f"{name} has shape {leaf.shape}, but its spec is {spec}")
        for length, axis in zip(leaf.shape, spec, strict=True):
            if axis is not None and length % mesh.shape[axis]:
                raise ValueError(
                    f"{name} of shape {leaf.shape} does not split over {size}"
                )
        splits[name] = Split(leaf.shape, spec)
    return splits


def array_sharding(
    shape: Sequence[int],
    mesh: Mesh,
    *,
    min_size: float,
    spec: Spec = (),
    axis: str = "fsdp",
) -> NamedSharding:
    """The sharding of one array of the state.

    The largest axis that the `fsdp` size divides is split, if the array has at least
    `min_size` elements; otherwise the array is replicated. It depends on the shape
    and the spec alone, so a parameter, its gradient and its moments are split alike.

    Args:
      shape: of the array.
      mesh: the devices.
      min_size: see above.
      spec: axes that are split already, over `model`.
      axis: the mesh axis over which to split.
    """
    size = mesh.shape[axis]
    full: list[str | None] = [*spec, *(None,) * (len(shape) - len(spec))]
    if size > 1 and math.prod(shape) >= min_size:
        for i in sorted(range(len(shape)), key=lambda i: -shape[i]):
            if full[i] is None and shape[i] % size == 0:
                full[i] = axis
                break
    return NamedSharding(mesh, P(*full) if any(full) else P())


def state_sharding(
    abstract: Any,
    mesh: Mesh,
    *,
    min_size: float,
    splits: Mapping[str, Split] | None = None,
    axis: str = "fsdp",
) -> Any:
    """The tree of shardings for a tree of abstract arrays.

    An array whose path ends with that of a split parameter, and whose shape does so
    too, is split as that one: its moments, its running average, and all of them with
    further leading axes.

    Args:
      abstract: the tree; a train state, or a network's variables.
      mesh: the devices.
      min_size: see `array_sharding`.
      splits: see `model_splits`.
      axis: see `array_sharding`.
    """
    splits = splits or {}

    def one(path: Any, leaf: Any) -> NamedSharding:
        if path_name(path).startswith(_OF_EACH_DEVICE):
            return NamedSharding(mesh, P("data"))
        spec = _split_of(path_name(path), leaf.shape, splits)
        return array_sharding(leaf.shape, mesh, min_size=min_size, spec=spec, axis=axis)

    return jax.tree.map_with_path(one, abstract)


def _split_of(name: str, shape: tuple[int, ...], splits: Mapping[str, Split]) -> Spec:
    while name:
        split = splits.get(name)
        if split is not None:
            extra = len(shape) - len(split.shape)
            if extra >= 0 and shape[extra:] == split.shape:
                return (None,) * extra + split.spec
        name = name.partition("/")[2]
    return ()
