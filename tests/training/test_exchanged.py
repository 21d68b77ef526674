"""The step with exchanges of gradients: equal to plain training, and what is sent."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxkd import exchange
from jaxkd.analysis import read_collectives, sum_up
from jaxkd.data import Augmentation
from jaxkd.distill import weighted
from jaxkd.training import (
    ConfigError,
    StopSignal,
    Workdir,
    from_linen,
    init_state,
    make_train_step,
    optimizers,
    run,
    sharding,
)
from jaxkd.training import runner as runner_lib
from jaxkd.training.checkpoints import abstract_like
from jaxkd.training.exchanged import ExchangedState, PerDevice
from jaxkd.training.sections import OptimizerPlan
from jaxkd.training.signals import Stopped

from .conftest import DATA, Small  # isort: skip

SHAPE = (8, 8, 1)
RATE = 0.1


def prepared(made, plan=None, *, norm=False, accumulate=1, mesh=None, teacher=False):
    """A compiled step over eight devices, and its state before the first step."""
    mesh = mesh or sharding.make_mesh()
    plan = plan or OptimizerPlan(learning_rate=RATE)
    per_device = None if made is None else PerDevice(made, mesh)
    tx = optimizers.optimizer(
        plan,
        lambda step: jnp.float32(RATE),
        has_momentum=made is not None and made.has_momentum,
    )
    if per_device is not None:
        tx = per_device.optimizer(tx)
    student = from_linen("student", Small(norm=norm), SHAPE)
    teachers = (from_linen("teacher", Small(), SHAPE),) if teacher else ()
    method = weighted({"ce": 0.5, "kd": 0.5} if teacher else {"ce": 1.0})
    step = make_train_step(
        student=student.apply,
        teachers=[t.apply for t in teachers],
        method=method,
        tx=tx,
        schedule=lambda step: jnp.float32(RATE),
        augmentation=Augmentation(),
        num_classes=3,
        steps_per_epoch=DATA.steps_per_epoch,
        epochs=DATA.epochs,
        accumulate=accumulate,
        exchange=per_device,
    )

    def first():
        return init_state(
            jax.random.key(0), student=student, method=method, teachers=teachers,
            tx=tx, data=DATA,
        )  # fmt: skip

    shapes = jax.eval_shape(first)
    stored = sharding.state_sharding(shapes, mesh, min_size=1e9)
    whole = sharding.replicated(mesh)
    variables = tuple(t.init(jax.random.key(7)) for t in teachers)
    state = jax.jit(first, out_shardings=stored)()
    compiled = (
        jax.jit(step, out_shardings=(stored, whole))
        .lower(
            abstract_like(shapes, stored),
            sharding.put_batch(some_batch(0), mesh),
            jax.device_put(variables, whole),
        )
        .compile()
    )

    def run(state, batch):
        return compiled(
            state, sharding.put_batch(batch, mesh), jax.device_put(variables, whole)
        )

    return run, state, compiled


def some_batch(seed):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(16, *SHAPE)).astype(np.float32),
        "label": rng.integers(0, 3, 16).astype(np.int32),
        "index": np.arange(16, dtype=np.int32),
    }


def trained(run, state, steps=3):
    for i in range(steps):
        state, metrics = run(state, some_batch(i))
    return state, metrics


@pytest.mark.parametrize(
    ("changes", "accumulate", "teacher"),
    [
        ({}, 1, True),
        ({"nesterov": True, "weight_decay": 0.05}, 1, False),
        ({"weight_decay": 0.05, "weight_decay_mask": "kernels"}, 2, False),
    ],
)
def test_ratio_one_is_uncompressed_training(changes, accumulate, teacher):
    plan = OptimizerPlan(learning_rate=RATE, **changes)
    made = exchange.dgc(ratio=1.0, momentum=plan.momentum, nesterov=plan.nesterov)
    options = dict(accumulate=accumulate, teacher=teacher)
    one, metrics = trained(*prepared(made, plan, **options)[:2])
    two, wanted = trained(*prepared(None, plan, **options)[:2])
    for a, b in zip(
        jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-5)
    assert set(metrics["terms"]) == set(wanted["terms"])


def test_each_device_keeps_what_it_did_not_send():
    run, state, compiled = prepared(exchange.dgc(ratio=0.1))
    state, metrics = trained(run, state, 2)
    assert isinstance(state.opt_state, ExchangedState)
    kernel = "network/Conv_0/kernel"
    unsent = state.opt_state.exchange.unsent[kernel]
    assert unsent.shape == (8, 3, 3, 1, 4) and unsent.sharding.spec == P("data")
    # Devices have records of their own.
    values = np.asarray(unsent)
    assert all((values[i] != values[0]).any() for i in range(1, 8))
    # ceil(3.6) numbers of 36 were sent last, and are zero.
    assert ((values == 0).reshape(8, -1).sum(1) >= 4).all()
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    for leaf in jax.tree.leaves(state.params):
        assert leaf.sharding.is_fully_replicated


def test_bytes_of_the_compiled_step_are_those_counted_by_hand():
    # Kernels of 36 and 12 numbers, biases of 4 and 3.
    small = 4 * (4 + 3)
    # The only term, which is the loss, and whether gradients are finite.
    scalars = 4 * 2
    _, _, plain = prepared(None)
    found = sum_up(read_collectives(plain))
    assert found["all-reduce"].bytes == 4 * (36 + 12) + small + 4
    _, _, compiled = prepared(exchange.dgc(ratio=0.1))
    found = sum_up(read_collectives(compiled))
    assert found["all-gather"].bytes == 8 * (4 + 2) * (4 + 4)
    assert found["all-reduce"].bytes == small + scalars
    assert set(found) == {"all-gather", "all-reduce"}


def test_batch_norm_sees_one_share_and_statistics_are_averaged():
    run, state, _ = prepared(exchange.dgc(ratio=1.0), norm=True)
    batch = some_batch(0)
    state, _ = run(state, batch)
    start = prepared(None, norm=True)[1]
    kernel = start.params["network"]["Conv_0"]
    features = jax.lax.conv_general_dilated(
        batch["image"], kernel["kernel"], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ) + kernel["bias"].reshape(1, 1, 1, -1)  # fmt: skip
    shares = np.asarray(features).reshape(8, 2 * 8 * 8, 4)
    variance = 0.9 * 1.0 + 0.1 * shares.var(1).mean(0)
    found = state.collections["batch_stats"]["BatchNorm_0"]["var"]
    np.testing.assert_allclose(found, variance, rtol=1e-4)
    assert (shares.var(1).mean(0) < shares.reshape(-1, 4).var(0)).all()


@pytest.mark.parametrize(
    "made",
    [
        exchange.powersgd(ranks={"network/Conv_0/kernel": 2}, start_step=1),
        exchange.quantized(bits=4, devices=8),
        exchange.dgc(ratio=0.1, warmup_ratios=(1.0,), steps_per_epoch=2),
    ],
    ids=["powersgd", "quantized", "dgc"],
)
def test_every_exchange_lowers_the_loss(made):
    run, state, _ = prepared(made)
    batch, losses = some_batch(0), []
    structure = jax.tree.structure(state)
    for _ in range(12):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"]))
    assert jax.tree.structure(state) == structure
    assert losses[-1] < 0.97 * losses[0]


def test_the_optimiser_of_an_exchange_keeps_its_own_state():
    made = PerDevice(exchange.quantized(devices=8), sharding.make_mesh())
    tx = made.optimizer(optax.adam(0.1))
    params = {"kernel": jnp.ones((3, 4))}
    state = tx.init(params)
    assert state.exchange.error["kernel"].shape == (8, 3, 4)
    updates, new = tx.update({"kernel": jnp.ones((3, 4))}, state, params)
    np.testing.assert_allclose(updates["kernel"], -0.1, rtol=1e-3)
    assert new.exchange is state.exchange
    assert dataclasses.is_dataclass(new.exchange)


def test_other_axes_of_the_mesh_are_refused():
    with pytest.raises(ValueError, match="the mesh has fsdp 2; set config.mesh.fsdp"):
        PerDevice(exchange.dgc(), sharding.make_mesh(fsdp=2))


# --------------------------------------------------------------------------- whole runs


def with_exchange(optimizer=None, **options):
    """The student's stage with an exchange."""
    return {
        "optimizer": {"learning_rate": 0.05, "exchange": options} | (optimizer or {})
    }


def finish(setup, path):
    workdir = Workdir(path)
    workdir.claim(setup.plan)
    with StopSignal() as stop:
        run(setup, workdir, command="test", stop=stop)


def losses_of(path):
    lines = (path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]


def test_a_stopped_run_goes_on_with_what_every_device_kept(
    tmp_path, monkeypatch, stored_setup
):
    setup = stored_setup(
        student=with_exchange(name="dgc", ratio=0.05, warmup_ratios=(0.2,)),
        log={"every_steps": 1},
    )
    finish(setup, tmp_path / "whole")
    due = runner_lib._Loop._stopping

    def stopping(loop, before, step):
        return step == 3 or due(loop, before, step)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(runner_lib._Loop, "_stopping", stopping)
        finish(setup, tmp_path / "broken")
    finish(setup, tmp_path / "broken")
    whole = losses_of(tmp_path / "whole")
    assert [step for step, _ in whole] == [1, 2, 3, 4, 5, 6]
    assert losses_of(tmp_path / "broken") == whole


def test_several_seeds_keep_their_own(tmp_path, stored_setup):
    student = with_exchange(name="quantized", bits=4) | {"epochs": 1}
    options = {"student": student, "log": {"every_steps": 1}}
    finish(stored_setup(seeds=(3, 4), **options), tmp_path / "both")
    finish(stored_setup(seed=4, **options), tmp_path / "one")
    lines = (tmp_path / "both" / "metrics.jsonl").read_text().splitlines()
    both = [r for r in map(json.loads, lines) if r["kind"] == "train"]
    one = losses_of(tmp_path / "one")
    assert len(both) == len(one) == 3
    for record, (step, loss) in zip(both, one, strict=True):
        assert record["step"] == step
        np.testing.assert_allclose(record["loss_by_seed"][1], loss, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"ratio": 0.1}, {}, "exchange needs a name, e.g. {'name': 'dgc'}"),
        ({"name": "dcg"}, {}, "exchange: no exchange 'dcg'; did you mean 'dgc'?"),
        ({"name": "dgc", "ratios": 1}, {}, "exchange: .*no option 'ratios'"),
        ({"name": "dgc", "momentum": 0.5}, {}, "momentum is not set here"),
        ({"name": "dgc"}, {"optimizer": {"name": "adam"}}, "'dgc' has the momentum"),
        ({"name": "dgc"}, {"mesh": {"fsdp": 2}}, "the mesh has fsdp 2"),
        ({"name": "powersgd", "rank": 50}, {}, "large enough for rank 50"),
        (
            {"name": "dgc"},
            {"compress": {"static": {}}},
            "a compressed network needs those of all devices; leave one",
        ),
        (
            {"name": "dgc"},
            {"select": {"name": "loss_rank"}},
            "a selection of records needs those of all devices",
        ),
    ],
)
def test_mistakes_end_in_one_line(
    stored_setup, stored_config, options, changes, message
):
    changes = dict(changes)
    stage = with_exchange(changes.pop("optimizer", None), **options)
    if "select" in changes:
        stage["select"] = changes.pop("select")
    if "compress" in changes:
        networks = stored_config()["networks"]
        scope = {"sparse": ["Conv_0"]}
        compress = {"static": {"scope": scope}}
        changes.pop("compress")
        networks["student"] = {**networks["student"], "compress": compress}
        changes["networks"] = networks
    with pytest.raises(ConfigError, match=message) as error:
        stored_setup(student=stage, **changes)
    assert "optimizer" in str(error.value) and "\n" not in str(error.value)
