"""Rematerialisation and accumulation: the same steps, in less memory.

Memory is that of compiled programs that never run.
"""

import dataclasses
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import models
from jaxkd.data import Augmentation
from jaxkd.distill import DataSpec, weighted
from jaxkd.training import (
    ConfigError,
    Plan,
    from_linen,
    init_state,
    make_setup,
    make_train_step,
    sharding,
)
from jaxkd.training.compilation import compile_ahead
from jaxkd.training.plan import NetworkPlan

FAMILIES = {
    "small": ("resnet8", {}, (8, 8, 8, 3)),
    "resnet": ("resnet14", {}, (8, 16, 16, 3)),
    "vit": ("deit_tiny", {"depth": 4, "patch_size": 4}, (8, 24, 24, 3)),
}
KINDS = ("none", "dots", "blocks")


class Case:
    """A student, a teacher and a step."""

    def __init__(
        self,
        family="small",
        remat="none",
        *,
        dtype=jnp.float32,
        batch_size=None,
        teacher=None,
        accumulate=1,
        ema=None,
    ):
        name, options, (size, *image) = FAMILIES[family]
        create = functools.partial(models.create, num_classes=4, dtype=dtype)
        size = batch_size or size
        student = from_linen("student", create(name, remat=remat, **options), image)
        teacher = from_linen(
            "teacher", create(teacher or name, **({} if teacher else options)), image
        )
        method, tx = weighted({"ce": 0.5, "kd": 0.5}), optax.sgd(0.1, momentum=0.9)
        dense = len(student.spec.logits) == 3
        self.data = DataSpec(
            records=64, num_classes=4, batch_size=size, steps_per_epoch=4, epochs=2
        )
        self.step = make_train_step(
            student=student.apply,
            teachers=[teacher.apply],
            method=method,
            tx=tx,
            schedule=lambda s: jnp.float32(0.1),
            augmentation=Augmentation(),
            num_classes=4,
            steps_per_epoch=4,
            epochs=2,
            accumulate=accumulate,
            ema=ema,
        )
        self.state = functools.partial(
            init_state,
            jax.random.key(0),
            student=student,
            method=method,
            teachers=(teacher,),
            tx=tx,
            data=self.data,
            ema=ema,
        )
        self.teachers = jax.jit(lambda: (teacher.init(jax.random.key(1)),))
        rng = np.random.default_rng(0)
        self.batch = {
            "image": rng.normal(size=(size, *image)).astype(np.float32),
            "label": rng.integers(0, 4, (size, *image[:2]) if dense else size),
            "index": np.arange(size, dtype=np.int32),
        }

    @functools.cached_property
    def report(self):
        """What the compiled step costs."""
        return compile_ahead(self.step, *self.abstract(), donate_argnums=0)[1]

    def abstract(self):
        """The arguments of the step, without their values."""
        return jax.eval_shape(
            lambda: (
                self.state(),
                jax.tree.map(jnp.asarray, self.batch),
                self.teachers(),
            )
        )

    def steps(self, count=2):
        step = jax.jit(self.step)
        state, teachers, metrics = jax.jit(self.state)(), self.teachers(), None
        for _ in range(count):
            state, metrics = step(state, self.batch, teachers)
        return jax.device_get((state.replace(key=jnp.zeros(())), metrics))


@pytest.fixture(scope="module")
def cases():
    """Cases by their options, each compiled once."""
    return functools.cache(lambda *args, **options: Case(*args, **options))


def close(a, b, rtol=1e-3, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_blocks_take_less_memory_than_dots_and_dots_less_than_none(family, cases):
    none, dots, blocks = (cases(family, kind).report for kind in KINDS)
    assert dots.temporary_bytes < 0.8 * none.temporary_bytes
    assert blocks.temporary_bytes < 0.8 * dots.temporary_bytes
    # Dots compute hardly more, blocks the student's forward pass again.
    assert none.flops <= dots.flops < 1.1 * none.flops
    assert 1.1 * none.flops < blocks.flops < 1.34 * none.flops


@pytest.mark.parametrize(
    ("remat", "options"),
    [
        ("dots", {"accumulate": 2, "ema": 0.9}),
        ("blocks", {"accumulate": 2, "ema": 0.9}),
        ("dots", {"family": "vit"}),
    ],
)
def test_steps_have_the_numbers_of_those_without(remat, options, cases):
    expected = cases(**options).steps()
    got = Case(remat=remat, **options).steps()
    # Statistics of the batch are recorded once, or they would have moved twice as far.
    close(got, expected)


def test_narrow_steps_have_the_numbers_of_those_without():
    expected = Case(dtype=jnp.bfloat16).steps(1)
    got = Case(dtype=jnp.bfloat16, remat="blocks").steps(1)
    # What is recomputed may be rounded elsewhere.
    close(got, expected, rtol=0.05, atol=0.02)


def test_eight_simulated_devices_give_the_numbers_of_one():
    case = Case(remat="dots")
    expected = case.steps()
    mesh = sharding.make_mesh(data=2, fsdp=4)
    shapes = jax.eval_shape(case.state)
    places = sharding.state_sharding(shapes, mesh, min_size=64)
    state = jax.jit(case.state, out_shardings=places)()
    teachers = jax.device_put(case.teachers(), sharding.replicated(mesh))
    step = jax.jit(case.step, out_shardings=(places, sharding.replicated(mesh)))
    metrics = None
    for _ in range(2):
        state, metrics = step(state, sharding.put_batch(case.batch, mesh), teachers)
    got = jax.device_get((state.replace(key=jnp.zeros(())), metrics))
    close(got, expected)


def test_a_teacher_keeps_nothing_for_the_backward_pass(cases):
    """Three times the blocks of the same widths, and no more memory."""
    shallow = cases(batch_size=128).report.temporary_bytes
    deep = cases(batch_size=128, teacher="resnet20").report.temporary_bytes
    assert deep < 1.2 * shallow


def test_accumulation_takes_the_memory_of_a_part(cases):
    whole = cases(batch_size=128).report.temporary_bytes
    parts = cases(batch_size=128, accumulate=8).report.temporary_bytes
    assert parts < 0.35 * whole


def test_accumulated_gradients_are_float32_whatever_the_networks_compute_in():
    case = Case(dtype=jnp.bfloat16, accumulate=2)
    args = case.abstract()
    jaxpr = jax.make_jaxpr(case.step)(*args)
    (loop,) = (
        e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 2
    )
    carried = loop.outvars[: loop.params["num_carry"]]
    assert len(carried) > len(jax.tree.leaves(args[0].params))
    assert {v.aval.dtype for v in carried} == {jnp.dtype("float32")}


# ------------------------------------------------------------------------------- config


def plan(kind="dots", **student):
    network = {"name": "resnet18_seg", "width_factor": 0.0625}
    stage = {
        "teachers": ("teacher",),
        "method": {"ce": {}, "kd": {}},
        "epochs": 1,
        "optimizer": {"learning_rate": 0.1},
    }
    return Plan.from_config(
        {
            "run": ("student",),
            "networks": {
                "teacher": {"frozen": True, **network},
                "student": network | student,
            },
            "data": {"source": "liver_ct_sample", "batch_size": 8, "image_size": 32},
            "stages": {"student": stage},
            "train": {"remat": kind},
        }
    )


def recomputes(network):
    variables = jax.eval_shape(network.init, jax.random.key(0))

    def total(variables):
        images = jnp.zeros((2, 32, 32, 1))
        key = jax.random.key(0)
        outputs, _ = network.apply(variables, images, train=True, key=key)
        return jnp.sum(outputs.logits)

    return "remat" in str(jax.make_jaxpr(jax.grad(total))(variables))


def test_the_config_reaches_the_networks_that_learn_and_no_other():
    networks = make_setup(plan()).networks
    assert recomputes(networks["student"])
    assert not recomputes(networks["teacher"])


def test_a_networks_own_option_goes_before():
    assert not recomputes(make_setup(plan("blocks", remat=False)).networks["student"])
    assert recomputes(make_setup(plan("none", remat="dots")).networks["student"])


def test_a_network_that_takes_no_remat_is_refused_in_one_line(monkeypatch):
    own = types.ModuleType("own_networks")
    own.small = lambda num_classes: models.create("unet", num_classes=num_classes)
    monkeypatch.setitem(sys.modules, "own_networks", own)
    student = {"name": "own_networks:small"}
    config = plan()
    networks = {**config.networks, "student": NetworkPlan(**student)}
    message = (
        r"config\.networks\.student: config\.train\.remat is 'dots', but "
        r"'own_networks:small' takes no option 'remat'"
    )
    with pytest.raises(ConfigError, match=message):
        make_setup(dataclasses.replace(config, networks=networks))


def test_an_unknown_kind_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"config\.train\.remat: must be .*'dots'"):
        plan("everything")
