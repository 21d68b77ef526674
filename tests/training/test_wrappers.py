"""Networks made of networks."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.distill import Method, no_state
from jaxkd.layers import BatchNorm, Outputs, Partition
from jaxkd.numerics import resize_bilinear
from jaxkd.training import from_linen
from jaxkd.training.wrappers import (
    gather,
    join,
    member,
    readout_variables,
    renormalise,
    resized,
    with_images,
    with_readout,
)

SHAPE = (8, 8, 1)
IMAGES = jnp.asarray(np.random.default_rng(0).random((4, *SHAPE)), jnp.float32)


class Tiny(nn.Module):
    """Patches, batch norm, a linear head."""

    width: int = 8

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Conv(self.width, (4, 4), strides=(4, 4), name="stem")(images)
        pooled = BatchNorm(name="norm")(x, train).mean((1, 2))
        head = nn.Dense(3, name="head")
        return Outputs(
            logits=head(pooled),
            taps={"pooled": pooled},
            head=dict(head.variables["params"]),
        )


def network(name, width=8):
    return from_linen(name, Tiny(width), SHAPE)


@pytest.fixture(scope="module")
def joined():
    members = [network("a"), network("b"), network("wide", width=16)]
    both = join(members, SHAPE)
    return members, both, both.init(jax.random.key(0))


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


def test_the_first_of_joined_networks_starts_as_alone_and_equal_ones_differ(joined):
    members, _, variables = joined
    alone = members[0].init(jax.random.key(0))
    close(member(variables, "a"), alone)
    a, b = (member(variables, name)["params"]["head"]["kernel"] for name in "ab")
    assert a.shape == b.shape and not np.allclose(a, b)


def test_joined_networks_give_what_each_gives_alone(joined):
    members, both, variables = joined
    outputs, collections = both.apply(variables, IMAGES, train=True, key=None)
    for name, own, got in zip(
        ("a", "b", "wide"), members, (outputs, *outputs.peers), strict=True
    ):
        expected, updated = own.apply(
            member(variables, name), IMAGES, train=True, key=None
        )
        close(got.logits, expected.logits)
        close(member(collections, name), {"batch_stats": updated["batch_stats"]})
    assert [spec.taps["pooled"] for spec in both.spec.peers] == [(8,), (16,)]


def test_joined_networks_are_split_as_their_members(joined):
    members, both, _ = joined
    assert both.partition is None
    rules = Partition(rules={"head/kernel": (None, "model")}, units={"heads": 3})
    split = join([dataclasses.replace(members[0], partition=rules), members[1]], SHAPE)
    assert split.partition.spec("a/head/kernel") == (None, "model")
    assert split.partition.spec("b/head/kernel") == ()
    assert split.partition.units == {"heads of a": 3}


def test_members_and_gather_are_inverse(joined):
    members, _, variables = joined
    parts = {m.name: member(variables, m.name) for m in members}
    close(gather(parts), variables)


def test_images_are_brought_to_another_normalisation():
    given, wanted = ((0.5,), (0.2,)), ((0.1,), (0.4,))
    raw = jnp.asarray(IMAGES)
    normalised = (raw - 0.5) / 0.2
    got = renormalise(normalised, given=given, wanted=wanted)
    np.testing.assert_allclose(got, (raw - 0.1) / 0.4, rtol=1e-5)
    got = renormalise(raw, given=None, wanted=wanted)
    np.testing.assert_allclose(got, (raw - 0.1) / 0.4, rtol=1e-5)


def test_images_of_the_right_size_are_not_touched():
    assert resized(jnp.asarray(IMAGES), (8, 8)).shape == (4, 8, 8, 1)
    np.testing.assert_array_equal(resized(IMAGES, (8, 8)), IMAGES)
    np.testing.assert_array_equal(
        resized(jnp.asarray(IMAGES), (6, 4)), resize_bilinear(IMAGES, (6, 4))
    )


def test_a_network_sees_changed_images():
    plain = network("plain")
    variables = plain.init(jax.random.key(0))
    doubled = with_images(plain, lambda images: 2 * images)
    got, _ = doubled.apply(variables, IMAGES, train=False, key=None)
    expected, _ = plain.apply(variables, 2 * IMAGES, train=False, key=None)
    close(got.logits, expected.logits)


def test_a_readout_takes_the_place_of_the_logits():
    def readout(params, memory, student):
        return student.taps["pooled"] @ params["kernel"] + memory["bias"][None]

    method = Method(
        init=no_state,
        terms=lambda params, memory, inputs: ({}, memory),
        weights={},
        readout=readout,
    )
    plain = network("plain")
    params, memory = {"kernel": jnp.ones((8, 3))}, {"bias": jnp.arange(3.0)}
    variables = {
        **plain.init(jax.random.key(0)),
        **readout_variables(method, params, memory),
    }
    wrapped = with_readout(plain, method)
    outputs, collections = wrapped.apply(variables, IMAGES, train=False, key=None)
    expected = outputs.taps["pooled"].sum(-1, keepdims=True) + jnp.arange(3.0)[None]
    close(outputs.logits, expected)
    assert outputs.head is None and "readout" in collections
    # A teacher in training mode predicts so as well, view after view.
    trained, collections = wrapped.apply(variables, IMAGES, train=True, key=None)
    expected = trained.taps["pooled"].sum(-1, keepdims=True) + jnp.arange(3.0)[None]
    close(trained.logits, expected)
    assert "readout" in collections
    own, _ = plain.apply(variables, IMAGES, train=False, key=None)
    assert not np.allclose(own.logits, outputs.logits)


def test_a_method_without_readout_changes_nothing():
    method = Method(
        init=no_state, terms=lambda params, memory, inputs: ({}, memory), weights={}
    )
    plain = network("plain")
    assert with_readout(plain, method) is plain
    assert readout_variables(method, {}, {}) == {}
