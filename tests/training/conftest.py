"""A small network, data and step that the tests of training share."""

import dataclasses
import sys
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
from jaxkd.training import (
    Plan,
    StopSignal,
    Workdir,
    from_linen,
    init_state,
    make_setup,
    make_train_step,
)
from jaxkd.training.labelling import label

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
    """Everything one step needs.

    Attributes:
      make_step: makes the step with other networks in place of these.
    """

    student: Any
    teachers: tuple
    method: Any
    tx: Any
    make_step: Any
    ema: float | None

    @property
    def step(self):
        return self.make_step(self.student, self.teachers)

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

        def make_step(student, teachers):
            return make_train_step(
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

        return Kit(student, teachers, method, tx, make_step, ema)

    return make


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=(16, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 3, 16).astype(np.int32),
        "index": np.arange(16, dtype=np.int32),
    }


# What follows is for stored teacher targets: a run that compiles at once.
NETWORK_OF_STORED = '''
"""A convolution with batch norm, and the layers that methods read."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxkd.distill import Method
from jaxkd.distill.method import no_state
from jaxkd.layers import BatchNorm, Outputs
from jaxkd.training import from_linen


class Network(nn.Module):
    num_classes: int
    width: int = 4
    factor: float = 1.0
    dense: bool = False
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(self.width, (3, 3), strides=2, dtype=self.dtype)(images)
        x = BatchNorm(name="norm")(x, train)
        taps = {"stage1_pre": x, "stage1": nn.relu(x)}
        if self.dense:
            x = jnp.repeat(jnp.repeat(nn.relu(x), 2, axis=1), 2, axis=2)
            return Outputs(logits=nn.Dense(self.num_classes)(x), taps=taps)
        taps["pooled"] = nn.relu(x).mean((1, 2))
        logits = self.factor * nn.Dense(self.num_classes, name="head")(taps["pooled"])
        return Outputs(
            logits=logits,
            taps=taps,
            head=self.get_variable("params", "head"),
            norms={"stage1_pre": self.get_variable("params", "norm")},
        )


def from_file(num_classes, width=8, factor=20.0):
    """A network whose variables follow no seed, as if they were read from a file."""
    network = from_linen("any", Network(num_classes, width, factor), (8, 8, 1))
    return dataclasses.replace(
        network, init=lambda key: network.init(jax.random.key(5))
    )


def second_tap() -> Method:
    """A method that takes the second of the taps that it finds."""

    def terms(params, memory, inputs):
        tap = list(inputs.teacher.taps.values())[1]
        return {"second_tap": tap.reshape(len(tap), -1).mean(-1)}, memory

    return Method(
        init=no_state, terms=terms, weights={"second_tap": 1.0}, num_teachers=1
    )


def mirrored() -> Method:
    """A method that shows the teacher a view that it makes itself."""

    def terms(params, memory, inputs):
        difference = inputs.teacher.views["mirrored"].logits - inputs.student.logits
        return {"mirrored": jnp.mean(difference**2, -1)}, memory

    return Method(
        init=no_state,
        terms=terms,
        weights={"mirrored": 1.0},
        num_teachers=1,
        views=("mirrored",),
        prepare=lambda batch, key: {
            **batch, "image_mirrored": batch["image"][:, :, ::-1]
        },
    )
'''


@pytest.fixture(scope="session")
def stored_module(tmp_path_factory):
    """Makes `network_of_stored:Network` importable, and a small set of images."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "network_of_stored.py").write_text(NETWORK_OF_STORED)
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 52), ("test", 16)):
        labels = np.arange(count) % 4
        images = rng.integers(0, 160, (count, 8, 8, 1))
        images[np.arange(count), 2 * labels] += 80
        arrays[f"{split}_images"] = images.astype(np.uint8)
        arrays[f"{split}_labels"] = labels
    np.savez(folder / "bars.npz", **arrays)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def stored_config(stored_module):
    """Makes a config whose student reads stored targets of a frozen teacher."""

    def make(
        *, targets=None, student=None, teachers=("teacher",), data=None, **changes
    ):
        name, optimizer = "network_of_stored:Network", {"learning_rate": 0.05}
        return {
            "seed": 1,
            "run": ("student",),
            "networks": {
                "teacher": {"name": name, "width": 8, "factor": 20.0, "frozen": True},
                "second": {"name": name, "width": 6, "factor": 30.0, "frozen": True},
                "student": {"name": name},
            },
            "data": {
                "source": "npz",
                "path": str(stored_module / "bars.npz"),
                "batch_size": 16,
                "augment": {"pad_crop": 1, "flip": "horizontal"},
                **(data or {}),
            },
            "stages": {
                "student": {
                    "teachers": teachers,
                    "method": {"ce": {"weight": 0.5}, "kd": {"weight": 0.5}},
                    "epochs": 2,
                    "optimizer": optimizer,
                    "targets": targets,
                    **(student or {}),
                },
            },
            **changes,
        }

    return make


@pytest.fixture(scope="session")
def stored_setup(stored_config):
    """Makes the objects of such a run."""

    def make(**changes):
        return make_setup(Plan.from_config(stored_config(**changes)))

    return make


@pytest.fixture(scope="session")
def write_targets():
    """Does what `--mode=label` does, in a folder; returns the workdir and its lines."""

    def write(setup, path, stop=None):
        workdir = Workdir(path)
        workdir.claim(setup.plan)
        stop = stop or StopSignal()
        return workdir, list(label(setup, workdir, command="test", stop=stop))

    return write
