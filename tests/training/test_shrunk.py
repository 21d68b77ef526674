"""Smaller networks from networks with closed channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import compression, models
from jaxkd.training.compressed import compressed
from jaxkd.training.network import from_linen
from jaxkd.training.shrunk import shrunk

SHAPE = (8, 8, 3)


@pytest.fixture(scope="module")
def network():
    module = models.create("resnet8", num_classes=3, width_factor=0.25)
    return from_linen("student", module, SHAPE)


def test_the_smaller_network_runs_and_learns_as_any_other(network):
    variables = jax.jit(network.init)(jax.random.key(0))
    path = "trunk/stage2_block1/conv1"
    keep = {path: np.arange(8) < 3}
    small, own = shrunk(network, variables, SHAPE, keep=keep)
    block = own["params"]["trunk"]["stage2_block1"]
    assert block["conv1"]["kernel"].shape == (3, 3, 4, 3)
    assert block["conv2"]["kernel"].shape == (3, 3, 3, 8)
    assert own["batch_stats"]["trunk"]["stage2_block1"]["norm1"]["mean"].shape == (3,)
    assert small.spec.num_classes == network.spec.num_classes
    abstract = jax.eval_shape(small.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, own)
    images = jnp.ones((2, *SHAPE))
    _, collections = small.apply(own, images, train=True, key=None)
    assert jax.tree.map(jnp.shape, collections["batch_stats"]) == jax.tree.map(
        jnp.shape, own["batch_stats"]
    )


def test_networks_whose_compression_adds_layers_are_refused(network):
    part = compression.create("lapp", bypass=True)
    student = compressed(network, compression.chain({"lapp": part}), SHAPE)
    with pytest.raises(ValueError, match="the compression of 'student' changes its"):
        shrunk(student, {}, SHAPE)
