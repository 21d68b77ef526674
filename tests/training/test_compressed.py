"""Compressed networks in the step: masks, dense gradients, terms, facts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill
from jaxkd.compression import Compression, chain, masked
from jaxkd.distill.method import DataSpec
from jaxkd.layers import NetworkSpec, Outputs
from jaxkd.training import wrappers
from jaxkd.training.compressed import COMPRESSION, compressed, split
from jaxkd.training.network import Network
from jaxkd.training.start import final_variables, init_state
from jaxkd.training.step import make_train_step

SHAPE = (2, 2, 1)
MASK = np.array([[True, False, True], [False, True, True]] * 2)


def linear(name="student"):
    """Logits of 4 pixels by a kernel [4, 3]."""

    def init(key):
        return {"params": {"head": {"kernel": jax.random.normal(key, (4, 3))}}}

    def apply(variables, images, *, train, key):
        x = images.reshape(len(images), -1)
        logits = x @ variables["params"]["head"]["kernel"]
        return Outputs(logits=logits, taps={}), {}

    spec = NetworkSpec.from_outputs(
        name, Outputs(logits=jax.ShapeDtypeStruct((1, 3), jnp.float32), taps={})
    )
    return Network(name, init, apply, spec)


def sparse(*, move=False, gain=False):
    """A fixed mask; optionally one that moves, and a learned factor with a term."""

    def init(key, params):
        assert list(params) == ["head/kernel"]
        learned = {"gain": jnp.float32(2.0)} if gain else {}
        return learned, {
            "mask": jnp.asarray(MASK),
            "seen": jnp.zeros((4, 3)),
            "told": jnp.zeros((3,), jnp.int32),
        }

    def effective(learned, state, params):
        kernel = masked(params["head/kernel"], state["mask"])
        return {"head/kernel": kernel * learned["gain"] if gain else kernel}

    def update(learned, state, after):
        mask = ~state["mask"] if move else state["mask"]
        told = jnp.stack(
            [after.step, jnp.int32(after.steps_per_epoch), jnp.int32(after.total_steps)]
        )
        return after.params, {
            "mask": mask,
            "seen": after.gradients["head/kernel"],
            "told": told,
        }

    return Compression(
        init=init,
        effective=effective,
        masks=lambda state: {"head/kernel": state["mask"]},
        update=update,
        terms=lambda learned, state, params: (
            {"gain": jnp.square(learned["gain"])} if gain else {}
        ),
        weights={"gain": 0.5} if gain else {},
        facts=lambda learned, state, params: {
            "density": jnp.mean(state["mask"].astype(jnp.float32))
        },
    )


class Plain:
    """No augmentation."""

    def train(self, batch, *, key, epoch, num_classes):
        return dict(batch)


def prepare(student, tx=None, ema=None):
    tx = tx or optax.chain(optax.trace(0.9), optax.scale(-0.1))
    method = distill.create("ce")
    data = DataSpec(records=8, num_classes=3, steps_per_epoch=2, epochs=5, batch_size=4)
    state = init_state(
        jax.random.key(0),
        student=student,
        method=method,
        teachers=(),
        tx=tx,
        data=data,
        ema=ema,
    )
    step = jax.jit(
        make_train_step(
            student=student.apply,
            teachers=(),
            method=method,
            tx=tx,
            schedule=lambda step: jnp.float32(0.1),
            augmentation=Plain(),
            num_classes=3,
            steps_per_epoch=2,
            epochs=5,
            ema=ema,
            upkeep=student.upkeep,
        )
    )
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(4, *SHAPE)), jnp.float32),
        "label": jnp.asarray([0, 1, 2, 1]),
        "index": jnp.arange(4),
    }
    return state, step, batch, method


def kernel_of(state):
    return np.asarray(state.params["network"]["head"]["kernel"])


def test_masked_numbers_stay_zero_and_so_do_their_moments():
    student = compressed(linear(), sparse(), SHAPE)
    state, step, batch, _ = prepare(student)
    assert (kernel_of(state)[~MASK] == 0).all() and (kernel_of(state)[MASK] != 0).all()
    before = kernel_of(state)
    for _ in range(3):
        state, metrics = step(state, batch, ())
    assert (kernel_of(state)[~MASK] == 0).all()
    assert (kernel_of(state)[MASK] != before[MASK]).all()
    (trace, _) = state.opt_state
    moment = np.asarray(trace.trace["network"]["head"]["kernel"])
    assert (moment[~MASK] == 0).all() and (moment[MASK] != 0).all()
    assert metrics["facts"]["density"] == pytest.approx(MASK.mean())


def test_it_equals_training_the_numbers_that_are_left_alone():
    student = compressed(linear(), sparse(), SHAPE)
    state, step, batch, _ = prepare(student)
    values = jnp.asarray(kernel_of(state)[MASK])
    moments = jnp.zeros_like(values)

    def loss(values):
        kernel = jnp.zeros((4, 3)).at[np.nonzero(MASK)].set(values)
        logits = batch["image"].reshape(4, -1) @ kernel
        chosen = jax.nn.log_softmax(logits)[jnp.arange(4), batch["label"]]
        return -jnp.mean(chosen)

    for _ in range(3):
        state, metrics = step(state, batch, ())
        gradient = jax.grad(loss)(values)
        norm = jnp.linalg.norm(gradient)
        moments = 0.9 * moments + gradient
        values = values - 0.1 * moments
    np.testing.assert_allclose(kernel_of(state)[MASK], values, rtol=1e-5)
    # The norm is that of the gradient which the optimiser sees.
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_the_update_sees_dense_gradients_and_where_the_stage_stands():
    student = compressed(linear(), sparse(), SHAPE)
    state, step, batch, _ = prepare(student)
    start = jnp.asarray(kernel_of(state))

    def loss(kernel):
        logits = batch["image"].reshape(4, -1) @ kernel
        chosen = jax.nn.log_softmax(logits)[jnp.arange(4), batch["label"]]
        return -jnp.mean(chosen)

    state, _ = step(state, batch, ())
    _, _, memory = split(state.variables())
    np.testing.assert_allclose(memory["seen"], jax.grad(loss)(start), rtol=1e-4)
    assert (np.asarray(memory["seen"])[~MASK] != 0).all()
    np.testing.assert_array_equal(memory["told"], [0, 2, 10])


def test_a_mask_that_moves_takes_values_and_moments_along():
    student = compressed(linear(), sparse(move=True), SHAPE)
    state, step, batch, _ = prepare(student)
    state, _ = step(state, batch, ())
    # What took part is dropped; what comes in starts at zero, without a moment.
    assert (kernel_of(state) == 0).all()
    assert (
        np.asarray(state.opt_state[0].trace["network"]["head"]["kernel"]) == 0
    ).all()
    state, _ = step(state, batch, ())
    assert (kernel_of(state) == 0).all()  # moved back
    _, _, memory = split(state.variables())
    np.testing.assert_array_equal(memory["mask"], MASK)


def test_learned_parameters_are_trained_and_terms_join_the_loss():
    student = compressed(linear(), sparse(gain=True), SHAPE)
    state, step, batch, _ = prepare(student)
    assert state.params["network"][COMPRESSION] == {"gain": 2.0}
    state, metrics = step(state, batch, ())
    assert metrics["terms"]["gain"] == 4.0
    np.testing.assert_allclose(
        metrics["loss"], metrics["terms"]["ce"] + 0.5 * 4.0, rtol=1e-6
    )
    assert state.params["network"][COMPRESSION]["gain"] != 2.0


@pytest.mark.parametrize("optimizer", ["adamw", "partition", "clipped"])
def test_moments_of_every_optimiser_are_masked(optimizer):
    tx = {
        "adamw": optax.adamw(0.1),
        "partition": optax.partition(
            {"all": optax.adam(0.1)}, lambda tree: jax.tree.map(lambda _: "all", tree)
        ),
        "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)),
    }[optimizer]
    student = compressed(linear(), sparse(), SHAPE)
    state, step, batch, _ = prepare(student, tx)
    state, _ = step(state, batch, ())
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (4, 3)]
    assert len(moments) == 2
    for moment in moments:
        assert (np.asarray(moment)[~MASK] == 0).all()
        assert (np.asarray(moment)[MASK] != 0).all()
    assert (kernel_of(state)[~MASK] == 0).all()


def test_averages_and_evaluation_use_the_masks():
    student = compressed(linear(), sparse(), SHAPE)
    state, step, batch, method = prepare(student, ema=0.5)
    state, _ = step(state, batch, ())
    variables = final_variables(state, method)
    assert variables[COMPRESSION]["mask"].dtype == bool
    # Numbers that do not take part have no say, whatever they are.
    broken = dict(variables)
    kernel = broken["params"]["head"]["kernel"]
    broken["params"] = {"head": {"kernel": jnp.where(MASK, kernel, 7.0)}}
    one, _ = student.apply(variables, batch["image"], train=False, key=None)
    two, _ = student.apply(broken, batch["image"], train=False, key=None)
    np.testing.assert_array_equal(one.logits, two.logits)


def test_restart_masks_what_was_taken_from_elsewhere():
    student = compressed(linear(), sparse(), SHAPE)
    variables = student.init(jax.random.key(0))
    taken = {**variables, "params": {"head": {"kernel": jnp.ones((4, 3))}}}
    new = student.upkeep.restart(jax.random.key(1), taken)
    np.testing.assert_array_equal(new["params"]["head"]["kernel"], MASK)
    assert jax.tree.structure(new) == jax.tree.structure(variables)


def test_students_that_learn_together_are_compressed_each():
    first = compressed(linear("a"), sparse(), SHAPE)
    both = wrappers.join([first, linear("b")], SHAPE)
    variables = both.init(jax.random.key(0))
    masks = both.upkeep.masks(variables)
    np.testing.assert_array_equal(masks["a"]["head"]["kernel"], MASK)
    assert masks["b"]["head"]["kernel"].all()
    gradients = jax.tree.map(jnp.ones_like, variables["params"])
    new = both.upkeep.update(
        variables, gradients, key=jax.random.key(0), step=0, steps_per_epoch=1,
        total_steps=2,
    )  # fmt: skip
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    np.testing.assert_array_equal(new[COMPRESSION]["a"]["seen"], np.ones((4, 3)))
    assert set(both.upkeep.facts(variables)) == {"a/density"}
    assert wrappers.join([linear("a"), linear("b")], SHAPE).upkeep is None


def test_chains_in_the_step():
    student = compressed(linear(), chain({"x": sparse(), "y": sparse()}), SHAPE)
    state, step, batch, _ = prepare(student)
    state, metrics = step(state, batch, ())
    assert (kernel_of(state)[~MASK] == 0).all()
    assert set(metrics["facts"]) == {"x/density", "y/density"}
