"""Meshes, the sharding rules of the state, and how batches are put on devices."""

import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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
