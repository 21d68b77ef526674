"""A small network that trains in the real step with any compression."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill
from jaxkd.compression import flatten
from jaxkd.data import Augmentation
from jaxkd.distill.method import DataSpec
from jaxkd.layers import BatchNorm, Outputs
from jaxkd.layers.convolution import Conv
from jaxkd.layers.dense import Dense
from jaxkd.sparsity.channels import find_channels
from jaxkd.training import from_linen, init_state, make_train_step
from jaxkd.training.compressed import compressed, split

SHAPE = (6, 6, 1)
MOMENTUM = 0.9


class Tiny(nn.Module):
    """Two convolutions, a dense layer and a classifier."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(images))
        x = nn.relu(nn.Conv(8, (3, 3), name="body")(x))
        x = nn.relu(nn.Dense(16, name="hidden")(x.mean((1, 2))))
        return Outputs(logits=nn.Dense(3, name="head")(x), taps={})


class Deep(nn.Module):
    """A convolution and a depthwise one with norms, a dense layer, a classifier."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = Conv(6, (3, 3), name="first")(images)
        x = nn.relu(BatchNorm(name="norm")(x, train))
        x = Conv(6, (3, 3), feature_group_count=6, use_bias=False, name="deep")(x)
        x = nn.relu(BatchNorm(name="deep_norm")(x, train))
        x = nn.relu(Dense(5, name="hidden")(x.mean((1, 2))))
        return Outputs(logits=Dense(3, name="head")(x), taps={})


@dataclasses.dataclass
class ChannelNetwork:
    """`Deep` as functions, with what is known of its channels."""

    module: Any
    init: Any
    logits: Any
    shape: Any
    variables: Any
    channels: Any


@pytest.fixture(scope="session")
def channel_network():
    module, shape = Deep(), (6, 6, 3)
    images = jnp.zeros((1, *shape))

    def init(key):
        return dict(module.init(key, images, train=False))

    def logits(variables, x):
        return module.apply(variables, x, train=False).logits

    variables = jax.jit(init)(jax.random.key(0))
    # No parameter is zero.
    variables = jax.tree.map(lambda x: x + 0.1, variables)
    channels = find_channels(init, logits, shape)
    return ChannelNetwork(module, init, logits, shape, variables, channels)


@dataclasses.dataclass
class Trained:
    """A stage under way.

    Attributes:
      student: the compressed network.
      state: before the next step.
      step: the jitted step.
      batch: what every step sees.
    """

    student: Any
    state: Any
    step: Any
    batch: Any
    metrics: Any = None

    def run(self, steps=1):
        for _ in range(steps):
            self.state, self.metrics = self.step(self.state, self.batch, ())
        return self

    @property
    def params(self):
        own, _, _ = split(self.state.variables())
        return jax.tree.map(np.asarray, flatten(own["params"]))

    @property
    def memory(self):
        return jax.tree.map(np.asarray, split(self.state.variables())[2])

    @property
    def moments(self):
        return jax.tree.map(np.asarray, flatten(self.state.opt_state[0].trace))

    def density(self):
        masks = self.memory["masks"].values()
        return sum(m.sum() for m in masks) / sum(m.size for m in masks)


@pytest.fixture
def start():
    """`start(compression, epochs=..., steps_per_epoch=...)` begins a stage."""

    def make(
        compression,
        *,
        epochs=5,
        steps_per_epoch=4,
        seed=0,
        batch_size=8,
        module=None,
    ):
        network = from_linen("student", module or Tiny(), SHAPE)
        student = compressed(network, compression, SHAPE)
        method = distill.create("ce")
        tx = optax.sgd(0.1, momentum=MOMENTUM)
        data = DataSpec(
            records=batch_size * steps_per_epoch, num_classes=3, epochs=epochs,
            steps_per_epoch=steps_per_epoch, batch_size=batch_size,
        )  # fmt: skip
        state = init_state(
            jax.random.key(seed), student=student, method=method, teachers=(), tx=tx,
            data=data,
        )  # fmt: skip
        step = make_train_step(
            student=student.apply,
            teachers=(),
            method=method,
            tx=tx,
            schedule=lambda step: jnp.float32(0.1),
            augmentation=Augmentation(),
            num_classes=3,
            steps_per_epoch=steps_per_epoch,
            epochs=epochs,
            upkeep=student.upkeep,
        )
        rng = np.random.default_rng(0)
        batch = {
            "image": jnp.asarray(rng.normal(size=(batch_size, *SHAPE)), jnp.float32),
            "label": jnp.asarray(rng.integers(0, 3, batch_size), jnp.int32),
            "index": jnp.arange(batch_size, dtype=jnp.int32),
        }
        return Trained(student, state, jax.jit(step), batch)

    return make


@pytest.fixture
def start_deep(start):
    """`start` with the network whose channels can be taken away."""
    return lambda part, **options: start(part, module=Deep(), **options)
