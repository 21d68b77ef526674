"""Meshes, the sharding rules of the state, and how batches are put on devices."""

import dataclasses
import itertools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxkd.layers import Partition
from jaxkd.training import sharding


def _sizes(**options):
    return tuple(sharding.make_mesh(**options).shape.items())


def test_mesh_takes_all_devices_by_default():
    assert _sizes() == (("data", 8), ("fsdp", 1), ("model", 1))
    assert _sizes(fsdp=4) == (("data", 2), ("fsdp", 4), ("model", 1))
    assert _sizes(fsdp=2, model=2) == (("data", 2), ("fsdp", 2), ("model", 2))
    one = jax.devices()[:1]
    assert _sizes(devices=one) == (("data", 1), ("fsdp", 1), ("model", 1))


def test_devices_along_model_are_neighbours():
    mesh = sharding.make_mesh(fsdp=2, model=2)
    assert [d.id for d in mesh.devices[0, 0]] == [0, 1]


def test_the_devices_of_a_mesh_are_those_that_jax_would_take():
    types = (AxisType.Auto,) * 3
    names = ("data", "fsdp", "model")
    for fsdp, model in ((1, 1), (4, 1), (2, 2), (1, 8)):
        shape = (8 // fsdp // model, fsdp, model)
        expected = jax.make_mesh(shape, names, axis_types=types)
        assert sharding.make_mesh(fsdp=fsdp, model=model) == expected


@dataclasses.dataclass(frozen=True)
class _Chip:
    """What JAX knows of a device; GPUs have no coordinates that it would use."""

    platform: str
    process_index: int
    id: int
    slice_index: int
    coords: tuple[int, ...] = (0, 0, 0)
    core_on_chip: int = 0
    device_kind: str = "TPU v4"


def _gpus(hosts, each):
    return [
        _Chip("gpu", i // each, i, i // each, device_kind="NVIDIA H200")
        for i in range(hosts * each)
    ]


def _tpus(lengths, *, slices=1):
    places = list(itertools.product(*map(range, lengths)))
    return [
        _Chip("tpu", s, s * len(places) + i, s, place)
        for s in range(slices)
        for i, place in enumerate(places)
    ]


def test_gpus_of_several_hosts_make_a_mesh_host_by_host():
    # Every host with GPUs is a slice to XLA, and `jax.make_mesh` takes one slice only.
    gpus = _gpus(2, 4)
    with pytest.raises(ValueError, match="multi-slice"):
        jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=gpus)
    assert not sharding.one_tpu_slice(gpus)
    mesh = sharding.make_mesh(fsdp=2, model=2, devices=gpus[::-1])
    assert mesh.shape == {"data": 2, "fsdp": 2, "model": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert [d.id for d in mesh.devices.flat] == list(range(8))
    assert {d.process_index for d in mesh.devices[1].flat} == {1}


def test_devices_of_a_slice_and_of_a_process_are_neighbours():
    # Processes dealt out to the hosts in turn, and numbers that say nothing.
    chips = [_Chip("gpu", p, 9 - p, p % 2) for p in range(4)]
    ordered = sharding.in_order(chips)
    assert [(d.slice_index, d.process_index) for d in ordered] == [
        (0, 0),
        (0, 2),
        (1, 1),
        (1, 3),
    ]


def test_tpus_of_one_slice_are_laid_along_their_links():
    tpus = _tpus((2, 2, 2))
    assert sharding.one_tpu_slice(tpus)
    assert not sharding.one_tpu_slice([*tpus[1:], *_gpus(1, 1)])
    mesh = sharding.make_mesh(fsdp=2, model=2, devices=tpus)
    for axis in (1, 2):
        first, second = mesh.devices.take(0, axis), mesh.devices.take(1, axis)
        for a, b in zip(first.flat, second.flat, strict=True):
            assert sum(x != y for x, y in zip(a.coords, b.coords, strict=True)) == 1


def test_tpus_of_several_slices_are_taken_slice_by_slice():
    tpus = _tpus((2, 2, 1), slices=2)
    assert not sharding.one_tpu_slice(tpus)
    mesh = sharding.make_mesh(fsdp=4, devices=tpus)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]


def test_axes_that_do_not_fit_the_links_of_a_slice_are_refused_in_one_line():
    with pytest.raises(ValueError) as error:
        sharding.make_mesh(fsdp=2, devices=_tpus((4, 4, 1)))
    text = str(error.value)
    assert "data 8 x fsdp 2 x model 1 does not fit the links of 4 x 4 x 1 TPUs" in text
    assert "leave data at -1 and take fsdp and model 1" in text and "\n" not in text
    assert sharding.make_mesh(fsdp=4, devices=_tpus((4, 4, 1))).shape["data"] == 4


@pytest.mark.parametrize(
    ("data", "fsdp", "model"), [(3, 1, 1), (-1, 3, 1), (4, 4, 1), (-1, 2, 3), (1, 1, 2)]
)
def test_axes_that_do_not_fit_the_devices_are_refused(data, fsdp, model):
    with pytest.raises(ValueError, match="devices wanted, 8 present") as error:
        sharding.make_mesh(data=data, fsdp=fsdp, model=model)
    assert "leave data at -1 and take fsdp x model from the divisors of 8" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 64, 128), P(None, None, None, "fsdp")),
        ((3, 3, 128, 64), P(None, None, "fsdp", None)),
        ((6, 1000), P(None, "fsdp")),
        ((1001, 12), P(None, "fsdp")),
        ((1001, 7), P()),
        ((64,), P()),
        ((), P()),
    ],
)
def test_the_largest_axis_that_divides_is_split(shape, spec):
    mesh = sharding.make_mesh(fsdp=4)
    assert sharding.array_sharding(shape, mesh, min_size=100).spec == spec


def test_without_fsdp_everything_is_replicated():
    mesh = sharding.make_mesh()
    found = sharding.array_sharding((512, 512), mesh, min_size=1)
    assert found.is_fully_replicated


@pytest.mark.parametrize(("model", "rows"), [(1, 2), (4, 8)])
def test_a_batch_is_split_over_two_axes_and_repeated_over_the_third(model, rows):
    mesh = sharding.make_mesh(fsdp=2, model=model)
    batch = {"image": np.arange(48.0).reshape(16, 3), "label": np.arange(16)}
    put = sharding.put_batch(batch, mesh)
    assert {s.data.shape for s in put["image"].addressable_shards} == {(rows, 3)}
    np.testing.assert_array_equal(put["label"], batch["label"])


def test_axes_before_the_batch_are_not_split():
    mesh = sharding.make_mesh()
    put = sharding.put_batch({"x": np.arange(48).reshape(3, 16)}, mesh, leading=1)
    assert {s.data.shape for s in put["x"].addressable_shards} == {(3, 2)}


class _Device(NamedTuple):
    process_index: int
    id: int


def _pretend(patch, *, processes, index):
    """Lets the eight devices belong to several processes."""
    real, each = sharding.batch_sharding, -(-8 // processes)

    def pretended(mesh):
        def positions(shape):
            found = real(mesh).devices_indices_map(shape).items()
            return {_Device(d.id // each, d.id): rows for d, rows in found}

        return types.SimpleNamespace(devices_indices_map=positions)

    patch.setattr(sharding, "batch_sharding", pretended)
    patch.setattr(jax, "process_index", lambda: index)


@pytest.mark.parametrize(
    ("axes", "processes", "parts"),
    [
        ({}, 1, [(0, 1)]),
        ({}, 2, [(0, 2), (1, 2)]),
        ({"fsdp": 4}, 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"model": 2}, 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        # A group of devices along model takes two processes, which read the same.
        ({"model": 4}, 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ({"model": 8}, 2, [(0, 1), (0, 1)]),
    ],
)
def test_processes_read_disjoint_parts_unless_they_share_a_layer(
    axes, processes, parts, monkeypatch
):
    found = []
    for index in range(processes):
        with monkeypatch.context() as patch:
            _pretend(patch, processes=processes, index=index)
            found.append(sharding.process_part(sharding.make_mesh(**axes)))
    assert found == parts


def test_reductions_over_a_sharded_batch_are_global():
    mesh = sharding.make_mesh()
    values = np.arange(16, dtype=np.float32)
    put = sharding.put_batch({"x": values}, mesh)
    assert float(jax.jit(jnp.var)(put["x"])) == pytest.approx(values.var())


@pytest.mark.parametrize("axes", [{}, {"model": 2}])
def test_processes_that_would_read_unequal_parts_are_refused(axes, monkeypatch):
    mesh = sharding.make_mesh(**axes)
    _pretend(monkeypatch, processes=3, index=0)
    with pytest.raises(ValueError, match="unequal or overlapping parts .* take model"):
        sharding.process_part(mesh)


@pytest.mark.parametrize(
    ("size", "accumulate", "message"),
    [(12, 1, "use 8 or 16"), (4, 1, "8 devices; use 8"), (24, 2, "use 16 or 32")],
)
def test_batches_that_do_not_split_evenly_name_sizes_that_do(size, accumulate, message):
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match=message):
        sharding.check_batch_size(size, mesh, accumulate=accumulate)
    sharding.check_batch_size(32, mesh, accumulate=accumulate)


def test_a_group_of_devices_along_model_counts_once():
    mesh = sharding.make_mesh(fsdp=2, model=2)
    assert sharding.batch_parts(mesh) == 4
    sharding.check_batch_size(4, mesh)
    with pytest.raises(ValueError, match="over 4 groups of 2 devices.* use 4 or 8"):
        sharding.check_batch_size(6, mesh)


RULES = Partition(
    rules={"first/kernel": (None, "model"), "second/kernel": ("model", None)},
    units={"heads": 6},
)


def _params():
    return {
        name: {"kernel": jnp.zeros((6, 6)), "bias": jnp.zeros(6)}
        for name in ("first", "second", "third")
    }


def test_moments_and_averages_are_split_as_their_parameters():
    mesh = sharding.make_mesh(model=2, fsdp=2)
    params = {"network": _params(), "method": {"second": {"kernel": jnp.zeros((8, 6))}}}
    tree = {
        "params": params,
        "opt_state": optax.adam(0.1).init(params),
        "average": {"params": _params()},
        "seeds": {"network": jax.tree.map(lambda x: jnp.stack([x] * 3), _params())},
    }
    splits = sharding.model_splits(_params(), RULES, mesh)
    assert set(splits) == {"first/kernel", "second/kernel"}
    found = sharding.state_sharding(tree, mesh, min_size=36, splits=splits)
    moments = found["opt_state"][0].mu["network"]
    for place in (found["params"]["network"], moments, found["average"]["params"]):
        assert place["first"]["kernel"].spec == P("fsdp", "model")
        assert place["second"]["kernel"].spec == P("model", "fsdp")
        assert place["third"]["kernel"].spec == P("fsdp", None)
        assert place["first"]["bias"].spec == P()
    assert found["seeds"]["network"]["first"]["kernel"].spec == P(None, "fsdp", "model")
    # Another shape under the same name is another array.
    assert found["params"]["method"]["second"]["kernel"].spec == P("fsdp", None)


def test_small_arrays_are_split_over_model_alone():
    mesh = sharding.make_mesh(model=2, fsdp=4)
    splits = sharding.model_splits(_params(), RULES, mesh)
    found = sharding.state_sharding(_params(), mesh, min_size=37, splits=splits)
    assert found["first"]["kernel"].spec == P(None, "model")
    assert found["third"]["kernel"].is_fully_replicated


def test_without_the_axis_or_without_rules_nothing_is_split_over_model():
    assert sharding.model_splits(_params(), RULES, sharding.make_mesh()) == {}
    assert sharding.model_splits(_params(), None, sharding.make_mesh(model=2)) == {}


@pytest.mark.parametrize(
    ("rules", "units", "message"),
    [
        ({}, {"heads": 6}, "6 heads do not split over 4; use 1, 2, 3, 6"),
        ({"first/bias": ("model",)}, {}, r"first/bias of shape \(6,\) does not split"),
        ({"first/bias": ("model", None)}, {}, r"first/bias has shape \(6,\), but its"),
    ],
)
def test_what_the_axis_does_not_divide_is_refused(rules, units, message):
    partition = Partition(rules=rules, units=units)
    with pytest.raises(ValueError, match=message):
        sharding.model_splits(_params(), partition, sharding.make_mesh(model=4))
