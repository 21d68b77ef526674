"""Paths of arrays, and copies between networks."""

import jax.numpy as jnp
import numpy as np

from jaxkd.training.paths import matching, started_from

OWN = {"params": {"a": {"kernel": jnp.zeros((2, 3))}, "b": jnp.zeros(4)}}
OTHER = {
    "params": {"a": {"kernel": jnp.ones((2, 3))}, "b": jnp.ones(5), "c": jnp.ones(1)}
}


def test_arrays_match_by_path_and_shape():
    assert matching(OWN, OTHER) == {"params/a/kernel": True, "params/b": False}


def test_only_matching_arrays_are_copied():
    got = started_from(OWN, OTHER)
    np.testing.assert_array_equal(got["params"]["a"]["kernel"], 1)
    np.testing.assert_array_equal(got["params"]["b"], jnp.zeros(4))
    assert got["params"].keys() == OWN["params"].keys()
