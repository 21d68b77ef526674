"""Selections in the step and in whole runs: digits, a network that compiles at once."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import select
from jaxkd.distill import weighted
from jaxkd.training import (
    ConfigError,
    Plan,
    StopSignal,
    Workdir,
    make_setup,
    run,
    sharding,
)
from jaxkd.training import runner as runner_lib
from jaxkd.training.selecting import check_by_record, keeping, loss_of_records
from jaxkd.training.signals import Stopped
from jaxkd.training.start import init_state
from jaxkd.training.step import make_train_step

from .conftest import DATA  # isort: skip

NETWORK = '''
"""A network that compiles at once."""

import flax.linen as nn
from jaxkd.layers import Outputs


class Linear(nn.Module):
    num_classes: int
    width: int = 8

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(images.shape[0], -1)
        hidden = nn.relu(nn.Dense(self.width)(x))
        return Outputs(logits=nn.Dense(self.num_classes)(hidden), taps={})
'''


@pytest.fixture(scope="module", autouse=True)
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "linear_of_selections.py").write_text(NETWORK)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def config(selection, *, student=None, **changes):
    optimizer = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}
    name = "linear_of_selections:Linear"
    common = {"optimizer": optimizer, "method": {"ce": {}}}
    return {
        "run": ("teacher", "student"),
        "networks": {
            "teacher": {"name": name, "width": 12},
            "student": {"name": name, "width": 6},
        },
        "data": {"source": "digits", "batch_size": 240},
        "stages": {
            "teacher": {**common, "epochs": 1},
            "student": {
                **common,
                "teachers": ("teacher",),
                "method": {"ce": {"weight": 0.5}, "kd": {"weight": 0.5}},
                "epochs": 4,
                "select": selection,
                **(student or {}),
            },
        },
        "log": {"every_steps": 1},
        **changes,
    }


def finish(path, changed):
    setup = make_setup(Plan.from_config(changed))
    workdir = Workdir(path)
    workdir.claim(setup.plan)
    with StopSignal() as stop:
        run(setup, workdir, command="test", stop=stop)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [r for r in records if r["kind"] == "train" and r["stage"] == "student"]


def prepare(selection, *, accumulate=1, method=None, make=None):
    kit = make(method or weighted({"ce": 1.0}))
    state = init_state(
        jax.random.key(0),
        student=kit.student,
        method=kit.method,
        teachers=kit.teachers,
        tx=kit.tx,
        data=DATA,
        selection=selection,
    )
    step = make_train_step(
        student=kit.student.apply,
        teachers=[t.apply for t in kit.teachers],
        method=kit.method,
        tx=kit.tx,
        schedule=lambda s: jnp.float32(0.1),
        augmentation=Plain(),
        num_classes=3,
        steps_per_epoch=4,
        epochs=5,
        accumulate=accumulate,
        selection=selection,
    )
    return kit, state, jax.jit(step)


@pytest.fixture
def batch(batch):
    return {name: jnp.asarray(value) for name, value in batch.items()}


class Plain:
    """No augmentation."""

    def train(self, batch, *, key, epoch, num_classes):
        return dict(batch)


def kernels(state):
    return jax.tree.leaves(state.params["network"])


def test_only_selected_records_have_a_gradient(make_kit, batch):
    """The step on a batch equals the step on its hardest records alone."""
    selection = select.ohem(keep=0.25)

    def plain_kit(method=None):
        return make_kit(method, norm=False)

    kit, state, step = prepare(selection, make=plain_kit)
    outputs, _ = kit.student.apply(
        state.variables(), batch["image"], train=True, key=None
    )
    logp = jax.nn.log_softmax(outputs.logits)
    losses = -logp[jnp.arange(16), batch["label"]]
    hard = np.asarray(select.hardest(losses, 4))
    new, metrics = step(state, batch, ())
    assert metrics["facts"]["records_selected"] == 0.25
    np.testing.assert_allclose(metrics["loss"], losses[hard].mean(), rtol=1e-5)
    _, alone, alone_step = prepare(None, make=plain_kit)
    few = {name: value[hard] for name, value in batch.items()}
    alone, _ = alone_step(alone, few, ())
    for one, two in zip(kernels(new), kernels(alone), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_weights_select_within_each_micro_batch(make_kit, batch):
    _, state, step = prepare(select.ohem(keep=0.25), accumulate=2, make=make_kit)
    _, metrics = step(state, batch, ())
    assert metrics["facts"]["records_selected"] == 0.25


def test_records_are_told_their_own_losses(make_kit, batch):
    """With and without micro-batches, whatever the order within the step."""
    told = {}

    def record(state, numbers, losses, step):
        return {"losses": state["losses"].at[numbers].set(losses)}

    selection = select.Selection(
        init=lambda key, data: {"losses": jnp.zeros(data.records)}, record=record
    )
    for accumulate in (1, 4):
        kit, state, step = prepare(
            selection,
            accumulate=accumulate,
            make=lambda method=None: make_kit(method, norm=False),
        )
        new, _ = step(state, batch, ())
        told[accumulate] = np.asarray(new.selection["losses"])
    logits = kit.student.apply(
        state.variables(), batch["image"], train=True, key=None
    )[0].logits  # fmt: skip
    expected = -jax.nn.log_softmax(logits)[jnp.arange(16), batch["label"]]
    for losses in told.values():
        np.testing.assert_allclose(losses[:16], expected, rtol=1e-5)
        assert (losses[16:] == 0).all()


def test_a_proxy_hands_over_the_records_that_it_finds_hard(make_kit, batch):
    kit = make_kit(norm=False)
    scorer = kit.student
    variables = scorer.init(jax.random.key(5))
    kept = keeping(select.proxy(keep=0.25), kit.student.apply, scorer.apply)
    few, teachers = kept(batch, kit.state(), ({}, variables))
    assert teachers == ({},) and len(few["image"]) == 4
    logits = scorer.apply(variables, batch["image"], train=False, key=None)[0].logits
    losses = -jax.nn.log_softmax(logits)[jnp.arange(16), batch["label"]]
    np.testing.assert_array_equal(few["index"], select.hardest(losses, 4))
    # Without one the learner ranks.
    own = keeping(select.proxy(keep=0.25), kit.student.apply, None)
    few, teachers = own(batch, kit.state(), ())
    assert teachers == () and len(few["label"]) == 4


def test_losses_of_records_join_terms_and_pixels():
    terms = {"a": jnp.arange(6.0).reshape(3, 2), "b": jnp.array([1.0, 2.0, 3.0])}
    result = loss_of_records({**terms, "c": jnp.float32(4)}, dict(a=2, b=1, c=0.5), 3)
    np.testing.assert_allclose(result, [4.0, 9.0, 14.0])
    check_by_record(terms, 3)
    with pytest.raises(ValueError, match="term 'c' has shape .* not one value for"):
        check_by_record({"c": jnp.float32(4)}, 3)


@pytest.mark.parametrize("resident", [True, False])
def test_hard_batches_visit_what_the_losses_say(tmp_path, resident):
    """Resident and streamed: the same batches, the same losses."""
    changed = config(
        {"name": "hard_batches", "delta": 0.4}, train={"resident": resident}
    )
    records = finish(tmp_path / "run", changed)
    steps = len(records) // 4
    assert [r["facts"]["data_used"] for r in records][steps - 1] == 1
    later = [r["facts"]["data_used"] for r in records][steps:]
    assert later[0] == pytest.approx(1 / 5) and len(later) == 3 * steps
    if resident:
        return
    other = finish(
        tmp_path / "other",
        {**changed, "train": {"resident": True, "steps_per_call": "epoch"}},
    )
    for one, two in zip(records, other, strict=True):
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-4)
        assert one["facts"] == two["facts"]


@pytest.mark.parametrize("resident", [True, False])
def test_a_stopped_run_goes_on_with_the_same_records(tmp_path, monkeypatch, resident):
    changed = config(
        {"name": "hard_batches", "delta": 0.5, "shuffle": True},
        train={"resident": resident},
    )
    whole = finish(tmp_path / "whole", changed)
    due, seen = runner_lib._Loop._stopping, []

    def stopping(loop, before, step):
        seen.append(step)
        if loop.stage.name == "student" and step == 9 and len(seen) < 100:
            seen.extend([0] * 100)
            return True
        return due(loop, before, step)

    monkeypatch.setattr(runner_lib._Loop, "_stopping", stopping)
    with pytest.raises(Stopped):
        finish(tmp_path / "broken", changed)
    broken = finish(tmp_path / "broken", changed)
    assert [r["step"] for r in broken] == [r["step"] for r in whole]
    assert [r["loss"] for r in broken] == [r["loss"] for r in whole]
    assert [r["facts"] for r in broken] == [r["facts"] for r in whole]


@pytest.mark.parametrize(
    "selection",
    [
        {"name": "loss_rank", "pressure": 10.0},
        {"name": "selective_backprop", "beta": 2.0, "history": 300},
        {"name": "proxy", "keep": 0.5, "network": "teacher"},
        {"name": "prune", "keep": 0.5, "raters": ("teacher",)},
    ],
    ids=lambda s: s["name"],
)
def test_every_selection_trains(tmp_path, selection):
    records = finish(tmp_path / "run", config(selection))
    assert all(np.isfinite(r["loss"]) for r in records)
    assert records[-1]["loss"] < records[0]["loss"]
    facts = records[-1]["facts"]
    if selection["name"] == "proxy":
        assert facts["records_selected"] == 0.5
    if selection["name"] == "selective_backprop":
        assert 0 < facts["records_selected"] < 1
    if selection["name"] == "prune":
        assert facts["data_used"] == pytest.approx(0.5, abs=0.01)


def test_several_seeds_pick_their_own_batches(tmp_path):
    changed = config(
        {"name": "hard_batches", "delta": 0.5, "shuffle": True},
        train={"resident": True},
    )
    both = finish(tmp_path / "both", {**changed, "seeds": (0, 3)})
    alone = finish(tmp_path / "alone", {**changed, "seed": 3})
    for one, two in zip(both, alone, strict=True):
        np.testing.assert_allclose(one["loss_by_seed"][1], two["loss"], rtol=1e-3)


@pytest.mark.parametrize(
    "selection",
    [
        select.hard_batches(delta=0.5),
        select.ohem(keep=0.5),
        select.proxy(keep=0.5),
        select.loss_rank(),
    ],
    ids=["hard_batches", "ohem", "proxy", "loss_rank"],
)
def test_eight_devices_select_as_one(make_kit, batch, selection):
    _, state, step = prepare(selection, make=make_kit)
    mesh = sharding.make_mesh(data=8)
    split = sharding.put_batch(
        {k: np.asarray(v)[None] for k, v in batch.items()}, mesh, leading=1
    )
    eight, _ = step(
        jax.device_put(state, sharding.replicated(mesh)),
        {k: v[0] for k, v in split.items()},
        (),
    )
    one, _ = step(state, batch, ())
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            continue
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("selection", "changes", "message"),
    [
        ({"delta": 0.5}, {}, "config.stages.student.select: names no selection"),
        ({"name": "hrd_batches"}, {}, "did you mean 'hard_batches'"),
        ({"name": "hard_batches", "delta": 0}, {}, "select: .*delta"),
        ({"name": "hard_batches", "delta": 0.05}, {}, "of 5 batches leaves none|none"),
        ({"name": "ohem", "keep": 0.001}, {}, "leaves no record"),
        (
            {"name": "proxy", "network": "tutor"},
            {},
            "network 'tutor' is not trained by an earlier stage; trained so far: tea",
        ),
        (
            {"name": "proxy", "network": "student"},
            {},
            "network 'student' is not trained by an earlier stage",
        ),
        (
            {"name": "hard_batches"},
            {"train": {"resident": False, "steps_per_call": 2}},
            "streamed one step at a time; set config.train.resident=True",
        ),
        (
            {"name": "hard_batches"},
            {"train": {"resident": False}, "seeds": (0, 1)},
            "seeds that pick their own records need them on the devices",
        ),
    ],
)
def test_mistakes_are_one_line(selection, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_setup(Plan.from_config(config(selection, **changes)))
    assert "\n" not in str(error.value)


def test_a_kept_batch_must_fit_the_micro_batches():
    changed = config({"name": "proxy", "keep": 0.9}, student={"accumulate": 5})
    with pytest.raises(ConfigError, match="keeps 216 of 240 records, which accumulate"):
        make_setup(Plan.from_config(changed))


def test_methods_are_told_the_batch_that_is_left():
    setup = make_setup(Plan.from_config(config({"name": "proxy", "keep": 0.5})))
    assert setup.stages[1].data.batch_size == 120
