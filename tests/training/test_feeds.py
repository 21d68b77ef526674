"""Feeds: resident records on eight simulated devices give the streamed batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxkd.data import arrays, pipeline
from jaxkd.data.arrays import ArraySource
from jaxkd.training import sharding
from jaxkd.training.feeds import (
    Resident,
    Streaming,
    choose_resident,
    device_memory,
    put_records,
    record_bytes,
    streamed_bytes,
    take_records,
)


def source_of(records, *, dense=False, dtype=np.uint8, classes=7):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (records, 4, 6, 3)).astype(dtype)
    if np.issubdtype(dtype, np.floating):
        images = images / np.asarray(7, dtype)
    shape = (records, 4, 6) if dense else (records,)
    labels = rng.integers(0, classes, shape)
    return arrays.arrays(
        split="train",
        images=images,
        labels=labels,
        class_names=[f"c{i}" for i in range(classes)],
    )


class FromFiles:
    """A source that cannot give several records at once."""

    def __init__(self, source):
        self._source, self.info, self.groups = source, source.info, source.groups

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self._source[index]


def batches_of(source, *, seed=0, batch_size=8):
    return pipeline.train_batches(source, batch_size=batch_size, seed=seed, epochs=2)


def mesh_of(data, fsdp=1):
    return sharding.make_mesh(
        data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp]
    )


def fed(feed, mesh, step, *, leading=0):
    """The batch of a step as the compiled program sees it."""
    iterator = feed.items()
    iterator.set_state({"next_step": step})
    item = sharding.put_batch(next(iterator), mesh, leading=leading)
    iterator.close()
    return jax.jit(feed.batch)(feed.constants, item)


@pytest.mark.parametrize("data, fsdp", [(1, 1), (8, 1), (2, 4)])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_resident_batches_are_the_streamed_ones(data, fsdp, dense, dtype):
    source = source_of(21, dense=dense, dtype=dtype)
    mesh, batches = mesh_of(data, fsdp), batches_of(source)
    resident, streaming = Resident(source, batches, mesh), Streaming(batches)
    for step in (0, 3):
        got, expected = fed(resident, mesh, step), fed(streaming, mesh, step)
        assert set(got) == set(expected) == {"image", "label", "index"}
        for name, value in expected.items():
            assert got[name].dtype == value.dtype
            np.testing.assert_array_equal(got[name], value)
            assert got[name].sharding.is_equivalent_to(
                sharding.batch_sharding(mesh), value.ndim
            )


def test_records_are_split_over_the_devices_and_keep_their_dtype():
    records = put_records(source_of(21, dense=True), mesh_of(8))
    assert records["image"].dtype == records["label"].dtype == jnp.uint8
    assert records["image"].shape == (24, 4, 6, 3)
    shards = records["image"].addressable_shards
    assert [s.data.shape[0] for s in shards] == [3] * 8
    # 21 records leave the last device without any.
    assert not np.asarray(shards[-1].data).any()


def test_labels_of_many_classes_keep_their_values():
    source = source_of(300, classes=300)
    records = put_records(source, mesh_of(2))
    np.testing.assert_array_equal(records["label"][:300], source.labels)


def test_a_source_of_files_is_read_once_and_whole():
    source = source_of(70)
    got = put_records(FromFiles(source), mesh_of(4))
    expected = put_records(source, mesh_of(4))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_flags_travel_as_flags():
    mesh = mesh_of(4)
    values = np.arange(8) % 3 == 0
    records = {"flag": jax.device_put(values, sharding.batch_sharding(mesh))}
    index = sharding.put_batch({"i": np.array([3, 3, 6, 1], np.int32)}, mesh)["i"]
    got = take_records(records, index, mesh)["flag"]
    assert got.dtype == bool and got.tolist() == [True, True, True, False]


def test_batches_of_several_seeds_stand_side_by_side():
    source, mesh = source_of(21), mesh_of(4)
    each = [batches_of(source, seed=seed) for seed in (3, 4)]
    resident = Resident(source, pipeline.Stacked(each), mesh)
    got = fed(resident, mesh, 1, leading=1)
    for i, batches in enumerate(each):
        for name, value in batches[1].items():
            np.testing.assert_array_equal(got[name][i], value)


def test_where_a_run_stands_is_the_same_for_both_feeds():
    source, mesh = source_of(21), mesh_of(1)
    batches = batches_of(source)
    streaming, resident = Streaming(batches).items(), None
    next(streaming)
    resident = Resident(source, batches, mesh).items()
    resident.set_state(streaming.get_state())
    np.testing.assert_array_equal(next(resident)["index"], next(streaming)["index"])
    streaming.close(), resident.close()


def choose(wanted, source, mesh, *, supported=True, in_memory=True):
    return choose_resident(
        wanted, source, mesh, supported=supported, in_memory=in_memory
    )


def test_what_is_sent_for_a_record_is_counted():
    # uint8 pixels, an int32 label or a mask of them, an int32 number.
    assert streamed_bytes(source_of(3)) == 4 * 6 * 3 + 4 + 4
    assert streamed_bytes(FromFiles(source_of(3, dense=True))) == 72 + 4 * 24 + 4


def test_small_sets_in_memory_are_resident_and_files_are_not():
    source, mesh = source_of(21), mesh_of(2)
    assert choose("auto", source, mesh)
    assert not choose("auto", FromFiles(source), mesh, in_memory=False)
    assert choose(True, FromFiles(source), mesh, in_memory=False)
    assert not choose("auto", source, mesh, supported=False)
    assert not choose(False, source, mesh)


@pytest.fixture
def processes(monkeypatch):
    """Lets this process believe in another one, which has some MiB for a device."""

    def make(other):
        def process_allgather(mine):
            assert mine.dtype == np.int32
            return np.stack([mine, np.asarray(other, mine.dtype)])

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(multihost_utils, "process_allgather", process_allgather)

    return make


def test_processes_agree_on_the_least_memory(processes):
    mesh = mesh_of(2)
    alone = device_memory(mesh)
    processes(3)
    assert device_memory(mesh) == 3 * 2**20
    processes(2**30)
    assert 0 <= alone - device_memory(mesh) < 2**20


def test_what_does_not_fit_in_one_process_is_resident_in_none(processes):
    source, mesh = source_of(40000), mesh_of(1)
    # 2.8 MiB: an eighth of 23 MiB, and not of 22.
    assert record_bytes(source) == 73
    processes(23)
    assert choose("auto", source, mesh)
    processes(22)
    assert not choose("auto", source, mesh)


class Huge(ArraySource):
    """Says that it has far more records than any memory."""

    def __len__(self):
        return 10**12


def test_data_that_do_not_fit_are_refused_with_both_sizes():
    small = source_of(4)
    huge = Huge("huge", small.take(np.arange(4))["image"], small.labels)
    mesh = mesh_of(2)
    assert record_bytes(small) == 4 * 6 * 3 + 1
    assert 0 < device_memory(mesh) < 2**50
    assert not choose("auto", huge, mesh)
    sizes = r"3.4e\+04 GiB on each of 2 devices, which have .* to stream them"
    with pytest.raises(ValueError, match=rf"1000000000000 training records .* {sizes}"):
        choose(True, huge, mesh)
    with pytest.raises(ValueError, match="for labelled records alone"):
        choose(True, small, mesh, supported=False)
