"""Feeds: where the compiled steps get their batches from.

A feed has `constants`, arrays that stay on the devices for the whole stage; it yields a
small tree of NumPy arrays for every step, its *items*; and `batch(constants, item)`,
which runs inside the compiled program, makes the batch of them. `Streaming` sends whole
batches. `Resident` keeps all records on the devices, in the dtypes of the source, and
sends the numbers of the records only. Both give the same batches.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkd.data import Source, pipeline
from jaxkd.training.sharding import BATCH_AXES

Batch = dict[str, jax.Array]
Item = Mapping[str, Any]

# Shares of a device's memory: what "auto" takes for data, and what is refused.
_AUTO_SHARE, _LARGEST_SHARE = 0.125, 0.8
_ROWS_PER_READ = 64


@runtime_checkable
class Feed(Protocol):
    """See the module docstring."""

    constants: Any

    def batch(self, constants: Any, item: Item) -> Batch:
        """The batch of one step; pure, to be called under jit."""
        ...

    def items(self) -> Any:
        """A grain iterator over the items, with `get_state` and `set_state`."""
        ...


class Streaming:
    """Sends every batch from the host.

    Args:
      batches: a sequence of batches, such as `pipeline.train_batches` returns.
    """

    def __init__(self, batches: Any):
        self.constants: Any = ()
        self._batches = batches

    def batch(self, constants: Any, item: Item) -> Batch:
        """The item itself."""
        del constants
        return dict(item)

    def items(self) -> Any:
        """Iterates over the batches, read ahead in the background."""
        return iter(self._batches)


class Resident:
    """Keeps all records on the devices, split over the batch axes of the mesh.

    Each device holds its share of the records. For every batch it looks up those that
    it has, and one reduce-scatter over bytes brings each record to the device that
    trains on it.

    Args:
      source: the records.
      batches: `pipeline.TrainBatches` over them, or one for each seed.
      mesh: the devices.
    """

    def __init__(
        self,
        source: Source,
        batches: pipeline.TrainBatches | pipeline.Stacked,
        mesh: Mesh,
    ):
        self.constants: Any = put_records(source, mesh)
        self._batches = batches
        self._mesh = mesh

    def batch(self, constants: Any, item: Item) -> Batch:
        """Looks the records of an item up.

        Args:
          constants: see `put_records`.
          item: `index` int32 `[*seeds, batch]`, and what else the batch gets.
        """
        found = take_records(constants, item["index"], self._mesh)
        found["label"] = found["label"].astype(jnp.int32)
        return {**found, **item}

    def items(self) -> Any:
        """Iterates over the numbers of the records."""
        return iter(pipeline.Numbers(self._batches))


def put_records(source: Source, mesh: Mesh) -> dict[str, jax.Array]:
    """Reads all records and splits them over the devices.

    Args:
      source: the records.
      mesh: the devices; a process reads what its own devices hold.

    Returns:
      The entries of the records, stacked `[records, ...]` and filled up with zeros to a
      multiple of the devices; images in the dtype of the source, dense labels uint8 if
      the classes allow it.
    """
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-len(source) // count)
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    positions = sharding.addressable_devices_indices_map((rows * count,))
    parts: dict[str, list[jax.Array]] = {}
    # Devices along other axes hold the same rows, which are read once.
    known: dict[int, dict[str, np.ndarray]] = {}
    for device, position in positions.items():
        assert position is not None
        first = position[0].start or 0
        if first not in known:
            known[first] = _read_rows(source, first, rows)
        for name, values in known[first].items():
            parts.setdefault(name, []).append(jax.device_put(values, device))
    return {
        name: jax.make_array_from_single_device_arrays(
            (rows * count, *arrays[0].shape[1:]), sharding, arrays
        )
        for name, arrays in parts.items()
    }


def take_records(
    records: Mapping[str, jax.Array], index: jax.Array, mesh: Mesh
) -> dict[str, jax.Array]:
    """The records `index`, on the devices that train on them.

    Args:
      records: see `put_records`.
      index: int32 `[*seeds, batch]`, split over the batch axes.
      mesh: the devices.

    Returns:
      The entries `[*seeds, batch, ...]`, split as `index` is.
    """
    if mesh.shape["data"] * mesh.shape["fsdp"] == 1:
        return {name: values[index] for name, values in records.items()}
    axis = index.ndim - 1

    def local(records: Any, index: jax.Array) -> Any:
        index = jax.lax.all_gather(index, BATCH_AXES, axis=axis, tiled=True)

        def take(values: jax.Array) -> jax.Array:
            place = index - jax.lax.axis_index(BATCH_AXES) * len(values)
            mine = (place >= 0) & (place < len(values))
            found = values[jnp.clip(place, 0, len(values) - 1)]
            mine = mine.reshape(*mine.shape, *(1,) * (found.ndim - mine.ndim))
            # One device has the record and all others add zeros.
            found = jnp.where(mine, found, jnp.zeros((), found.dtype))
            as_bits = found.astype(jnp.uint8) if found.dtype == bool else found
            sent = jax.lax.psum_scatter(
                as_bits, BATCH_AXES, scatter_dimension=axis, tiled=True
            )
            return sent.astype(found.dtype)

        return jax.tree.map(take, records)

    split = P(*(None,) * axis, BATCH_AXES)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(P(BATCH_AXES), split), out_specs=split
    )(dict(records), index)


def choose_resident(
    wanted: Literal["auto"] | bool,
    source: Source,
    mesh: Mesh,
    *,
    supported: bool,
    in_memory: bool,
) -> bool:
    """Whether the records shall live on the devices; the same in all processes.

    Args:
      wanted: as configured; "auto" takes sets that are in memory anyway, if a device's
        share is below an eighth of its memory.
      source: the records.
      mesh: the devices.
      supported: whether the batches are of these records alone.
      in_memory: whether the host has all images in memory, as an `ArraySource` does.

    Raises:
      ValueError: True is wanted, and it is impossible.
    """
    if wanted is False or (wanted == "auto" and not (supported and in_memory)):
        return False
    if not supported:
        raise ValueError(
            "True is for labelled records alone; leave it 'auto' with "
            "config.data.labelled_fraction"
        )
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-len(source) // devices) * record_bytes(source)
    memory = device_memory(mesh)
    if wanted == "auto":
        return size <= _AUTO_SHARE * memory
    if size > _LARGEST_SHARE * memory:
        raise ValueError(
            f"the {len(source)} training records take {_gib(size)} GiB on each of "
            f"{devices} devices, which have {_gib(memory)} GiB; set it to False to "
            "stream them, or lower config.data.image_size"
        )
    return True


def record_bytes(source: Source) -> int:
    """Bytes of one record on the devices."""
    return sum(v.nbytes for v in _read_rows(source, 0, 1).values())


def streamed_bytes(source: Source) -> int:
    """Bytes of one record as it is sent for every step."""
    record = pipeline.read_records(source, np.zeros(1, np.int32))
    return sum(value.nbytes for value in record.values())


def device_memory(mesh: Mesh) -> int:
    """Bytes of memory of one device; of the host's, its share, where it has none.

    Several processes must call this together: they get the least of all, in whole MiB,
    so that they decide alike what fits.
    """
    device = mesh.local_devices[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    if not memory:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = host // len(mesh.local_devices)
    if jax.process_count() == 1:
        return int(memory)
    from jax.experimental import multihost_utils

    # JAX would send the bytes as int32, which ends at 2 GiB.
    mebibytes = np.asarray(memory // 2**20, np.int32)
    return int(np.min(multihost_utils.process_allgather(mebibytes))) * 2**20


def _gib(size: float) -> str:
    return f"{size / 2**30:.2g}"


def _read_rows(source: Source, first: int, rows: int) -> dict[str, np.ndarray]:
    """The records from `first` on, filled up with zeros at the end of the source."""
    present = range(first, min(first + rows, len(source)))
    reads = [
        np.asarray(present[i : i + _ROWS_PER_READ], np.int32)
        for i in range(0, len(present), _ROWS_PER_READ)
    ]
    if not reads:
        empty = _read_rows(source, 0, 1)
        return {k: np.zeros((rows, *v.shape[1:]), v.dtype) for k, v in empty.items()}
    with ThreadPoolExecutor() as threads:
        read = list(threads.map(lambda i: pipeline.read_records(source, i), reads))
    stacked = {k: _stack([part[k] for part in read], rows) for k in read[0]}
    del stacked["index"]
    if source.info.num_classes <= 256:
        stacked["label"] = stacked["label"].astype(np.uint8)
    return stacked


def _stack(parts: Sequence[np.ndarray], rows: int) -> np.ndarray:
    missing = rows - sum(map(len, parts))
    filler = np.zeros((missing, *parts[0].shape[1:]), parts[0].dtype)
    return np.concatenate([*parts, filler])
