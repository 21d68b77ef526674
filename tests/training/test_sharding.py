"""Meshes, the sharding rule of the state, and how batches are put on devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxkd.training import sharding


def test_mesh_takes_all_devices_by_default():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1}
    assert dict(sharding.make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4}
    one = sharding.make_mesh(devices=jax.devices()[:1])
    assert dict(one.shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (4, 4)])
def test_axes_that_do_not_fit_the_devices_are_refused(data, fsdp):
    with pytest.raises(ValueError, match="devices wanted, 8 present"):
        sharding.make_mesh(data=data, fsdp=fsdp)


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


def test_a_batch_is_split_over_both_axes():
    mesh = sharding.make_mesh(fsdp=2)
    batch = {"image": np.arange(48.0).reshape(16, 3), "label": np.arange(16)}
    put = sharding.put_batch(batch, mesh)
    assert {s.data.shape for s in put["image"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(put["label"], batch["label"])


def test_reductions_over_a_sharded_batch_are_global():
    mesh = sharding.make_mesh()
    values = np.arange(16, dtype=np.float32)
    put = sharding.put_batch({"x": values}, mesh)
    assert float(jax.jit(jnp.var)(put["x"])) == pytest.approx(values.var())


@pytest.mark.parametrize(
    ("size", "accumulate", "message"),
    [(12, 1, "use 8 or 16"), (4, 1, "8 devices; use 8"), (24, 2, "use 16 or 32")],
)
def test_batches_that_do_not_split_evenly_name_sizes_that_do(size, accumulate, message):
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match=message):
        sharding.check_batch_size(size, mesh, accumulate=accumulate)
    sharding.check_batch_size(32, mesh, accumulate=accumulate)
