"""A small network, data and step that the tests of training share."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd.data import Augmentation
from jaxkd.distill import DataSpec, weighted
from jaxkd.layers import Outputs
from jaxkd.training import from_linen, init_state, make_train_step

DATA = DataSpec(records=64, num_classes=3, batch_size=16, steps_per_epoch=4, epochs=5)


class Small(nn.Module):
    """Convolution, optional batch norm, dense; with a costly tap nobody needs."""

    num_classes: int = 3
    norm: bool = True
    expensive_tap: bool = False

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Conv(4, (3, 3))(images)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        features = nn.relu(x)
        taps = {"features": features}
        if self.expensive_tap:
            taps["expensive"] = nn.Conv(256, (7, 7))(features)
        return Outputs(
            logits=nn.Dense(self.num_classes)(features.mean((1, 2))), taps=taps
        )


@dataclasses.dataclass
class Kit:
    """Everything one step needs."""

    student: Any
    teachers: tuple
    method: Any
    tx: Any
    step: Any
    ema: float | None

    def state(self, seed=0):
        return init_state(
            jax.random.key(seed),
            student=self.student,
            method=self.method,
            teachers=self.teachers,
            tx=self.tx,
            data=DATA,
            ema=self.ema,
        )

    def teacher_variables(self):
        return tuple(t.init(jax.random.key(7)) for t in self.teachers)


@pytest.fixture
def make_kit():
    def make(
        method=None,
        *,
        norm=True,
        expensive_tap=False,
        accumulate=1,
        ema=None,
        augmentation=None,
        learning_rate=0.1,
        momentum=0.9,
    ):
        shape = (8, 8, 1)
        student = from_linen("student", Small(norm=norm), shape)
        method = method or weighted({"ce": 1.0})
        teachers = tuple(
            from_linen("teacher", Small(expensive_tap=expensive_tap), shape)
            for _ in range(method.num_teachers)
        )
        tx = optax.sgd(learning_rate, momentum=momentum or None)
        step = make_train_step(
            student=student.apply,
            teachers=[t.apply for t in teachers],
            method=method,
            tx=tx,
            schedule=lambda s: jnp.asarray(learning_rate, jnp.float32),
            augmentation=augmentation or Augmentation(),
            num_classes=3,
            steps_per_epoch=DATA.steps_per_epoch,
            epochs=DATA.epochs,
            accumulate=accumulate,
            ema=ema,
        )
        return Kit(student, teachers, method, tx, step, ema)

    return make


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=(16, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 3, 16).astype(np.int32),
        "index": np.arange(16, dtype=np.int32),
    }
