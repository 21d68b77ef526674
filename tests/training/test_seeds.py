"""The axis of seeds, and what is said of several runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkd.training import sharding
from jaxkd.training.seeds import Seeds, mean_of, spread_of


def test_one_seed_has_no_axis():
    seeds = Seeds((7,))
    assert not seeds.several and seeds.keys().shape == ()
    assert seeds.lift(len) is len
    tree = {"a": jnp.ones(3)}
    assert seeds.each(tree) == [tree] and seeds.lift_sharding(tree) is tree


def test_the_runs_of_several_seeds_have_the_keys_of_each():
    seeds = Seeds((7, 2**32 - 1))
    keys = seeds.keys()
    assert keys.shape == (2,)
    for key, seed in zip(keys, seeds.seeds, strict=True):
        assert (
            jax.random.key_data(key) == jax.random.key_data(jax.random.key(seed))
        ).all()  # noqa: E501


def test_a_lifted_function_runs_for_each_and_is_taken_apart_again():
    seeds = Seeds((0, 1, 2))
    x = {"a": jnp.arange(6.0).reshape(3, 2)}
    lifted = seeds.lift(lambda x: jnp.sum(x["a"]))(x)
    np.testing.assert_array_equal(lifted, [1.0, 5.0, 9.0])
    assert [t["a"].tolist() for t in seeds.each(x)] == [[0, 1], [2, 3], [4, 5]]


def test_arrays_are_split_as_those_of_one_run():
    mesh = sharding.make_mesh(data=4, fsdp=2)
    one = {"a": NamedSharding(mesh, P(None, "fsdp")), "b": NamedSharding(mesh, P())}
    lifted = Seeds((0, 1)).lift_sharding(one)
    assert lifted["a"].spec == P(None, None, "fsdp") and lifted["b"].spec == P(None)


def test_means_and_deviations_are_of_the_metrics_that_all_have():
    metrics = [{"a": 1.0, "b": 2.0}, {"a": 3.0}, {"a": 8.0, "b": 0.0}]
    assert mean_of(metrics) == {"a": 4.0}
    assert spread_of(metrics) == {"a": pytest.approx(13**0.5)}
    assert mean_of(metrics[:1]) == metrics[0]
