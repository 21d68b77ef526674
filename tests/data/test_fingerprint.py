"""Fingerprints change with every value, and with nothing else."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.data.fingerprint import (
    file_fingerprint,
    source_fingerprint,
    tree_fingerprint,
)
from jaxkd.data.source import SourceInfo


class Records:
    """A source in memory."""

    groups = ()

    def __init__(self, count=40, name="records", dtype=np.uint8):
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (count, 4, 4, 1)).astype(dtype)
        self.labels = np.arange(count) % 3
        self.info = SourceInfo(
            name=name,
            task="classification",
            class_names=("a", "b", "c"),
            image_shape=(4, 4, 1),
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {
            "image": self.images[index],
            "label": np.array(self.labels[index], np.int32),
        }


def change_pixel(records):
    records.images[17, 2, 3, 0] ^= 1


def change_label(records):
    records.labels[39] += 1


def swap_records(records):
    records.images[[4, 5]] = records.images[[5, 4]]


def test_a_source_is_described():
    found = source_fingerprint(Records())
    assert len(found.pop("sha256")) == 64
    assert found == {
        "source": "records",
        "records": 40,
        "classes": ["a", "b", "c"],
        "image_shape": [4, 4, 1],
        "hashed_records": 40,
    }


def test_equal_sources_are_equal():
    assert source_fingerprint(Records()) == source_fingerprint(Records())


@pytest.mark.parametrize("change", [change_pixel, change_label, swap_records])
def test_every_value_counts(change):
    records = Records()
    change(records)
    assert (
        source_fingerprint(records)["sha256"] != source_fingerprint(Records())["sha256"]
    )


def test_the_type_of_images_counts():
    a, b = source_fingerprint(Records()), source_fingerprint(Records(dtype=np.float32))
    assert a["sha256"] != b["sha256"]


def test_large_sets_are_sampled_at_even_distances():
    records = Records(count=3000)
    found = source_fingerprint(records, whole_bytes=1000)
    assert found["records"] == 3000 and found["hashed_records"] == 1024
    records.images[-1, 0, 0, 0] ^= 1  # the last record is one of them
    assert source_fingerprint(records, whole_bytes=1000) != found
    whole = source_fingerprint(records)
    assert whole["hashed_records"] == 3000


def tree():
    return {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(3, jnp.bfloat16)}}


def renamed(t):
    return {"a": t["a"], "b": {"d": t["b"]["c"]}}


def reshaped(t):
    return {**t, "a": t["a"].reshape(3, 2)}


def retyped(t):
    return {**t, "a": t["a"].astype(jnp.int32)}


def changed(t):
    return {**t, "a": t["a"].at[1, 1].add(1e-6)}


@pytest.mark.parametrize("change", [renamed, reshaped, retyped, changed])
def test_path_shape_type_and_values_of_a_tree_count(change):
    assert tree_fingerprint(tree()) == tree_fingerprint(tree())
    assert tree_fingerprint(change(tree())) != tree_fingerprint(tree())


def test_where_an_array_lies_does_not_count():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    values = jnp.arange(16.0)
    assert tree_fingerprint(jax.device_put(values, split)) == tree_fingerprint(values)


def test_a_file_is_its_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_fingerprint(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
