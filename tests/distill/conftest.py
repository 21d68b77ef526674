"""Outputs with the geometry of HLFD's networks, made of random numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill
from jaxkd.layers import NetworkSpec, Outputs
from jaxkd.numerics import resize_bilinear

SIZE, BATCH = 32, 2
STUDENT = {"e1": (16, 3), "e2": (8, 3), "e3": (4, 4), "e4": (2, 5), "e5": (1, 6)}
TEACHER = {
    "e1": (16, 4),
    "e2": (8, 5),
    "e3": (16, 4),
    "e4": (4, 6),
    "e5": (2, 7),
    "d5": (32, 3),
    "d4": (32, 3),
    "d3": (32, 3),
    "d2": (16, 4),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A method with the networks and the batch it is tried on."""

    student: Outputs
    teachers: tuple[Outputs, ...]
    batch: dict[str, jax.Array]
    data: distill.DataSpec = distill.DataSpec(
        records=BATCH, num_classes=5, batch_size=BATCH, steps_per_epoch=1, epochs=10
    )

    @property
    def teacher(self) -> Outputs:
        return self.teachers[0]

    @property
    def specs(self) -> distill.Specs:
        return distill.Specs(
            student=NetworkSpec.from_outputs("student", self.student),
            teachers=tuple(
                NetworkSpec.from_outputs("teacher", teacher)
                for teacher in self.teachers
            ),
            data=self.data,
        )

    def init(self, method: distill.Method):
        return method.init(jax.random.key(1), self.specs)

    def inputs(self, *, seed=2, student=None, step=0) -> distill.Inputs:
        return distill.Inputs(
            student=student or self.student,
            teachers=self.teachers,
            batch=self.batch,
            key=jax.random.key(seed),
            progress=distill.Progress(
                step=jnp.asarray(step, jnp.int32),
                epoch=jnp.asarray(step // self.data.steps_per_epoch, jnp.int32),
                epochs=self.data.epochs,
            ),
        )

    def terms(self, method: distill.Method, *, state=None, **inputs):
        return self.step(method, state=state, **inputs)[0]

    def step(self, method: distill.Method, *, state=None, **inputs):
        params, memory = state or self.init(method)
        return method.terms(params, memory, self.inputs(**inputs))


def _random(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal((BATCH, *shape)), jnp.float32)


@pytest.fixture
def segmentation() -> Run:
    """HLFD's student and U-Net++ teacher on two small slices."""
    rng = np.random.default_rng(0)
    encoder = {tap: _random(rng, n, n, c) for tap, (n, c) in STUDENT.items()}
    # The student has no decoder: its d-taps are its encoder maps, enlarged.
    decoder = {
        large: resize_bilinear(encoder[small], (SIZE, SIZE), align_corners=True)
        for large, small in {"d5": "e4", "d4": "e3", "d3": "e2", "d2": "e1"}.items()
    }
    logits = _random(rng, SIZE, SIZE, 2)
    student = Outputs(logits=logits, taps={**encoder, **decoder, "out": logits})
    taps = {tap: _random(rng, n, n, c) for tap, (n, c) in TEACHER.items()}
    logits = _random(rng, SIZE, SIZE, 2)
    teacher = Outputs(logits=logits, taps={**taps, "out": logits})
    label = jnp.asarray(rng.integers(0, 2, (BATCH, SIZE, SIZE)), jnp.int32)
    return Run(student=student, teachers=(teacher,), batch={"label": label})


@pytest.fixture
def classification() -> Run:
    """Two classifiers of five classes."""
    rng = np.random.default_rng(0)
    student, teacher = _random(rng, 5), _random(rng, 5)
    return Run(
        student=Outputs(logits=student, taps={}),
        teachers=(Outputs(logits=teacher, taps={}),),
        batch={"label": jnp.array([3, 0], jnp.int32)},
    )
