"""Optimisers against the update rules written out, schedules against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd.training import optimizers
from jaxkd.training.sections import OptimizerPlan


def _rates(plan, *, epochs, steps_per_epoch):
    schedule = optimizers.learning_rate(
        plan, epochs=epochs, steps_per_epoch=steps_per_epoch
    )
    return [float(schedule(jnp.asarray(s))) for s in range(epochs * steps_per_epoch)]


def test_cosine_per_epoch_is_the_formula_of_the_card():
    plan = OptimizerPlan(
        learning_rate=1e-2,
        schedule="cosine",
        end_learning_rate=1e-6,
        granularity="epoch",
    )
    rates = _rates(plan, epochs=10, steps_per_epoch=3)
    for step, rate in enumerate(rates):
        epoch = step // 3
        expected = 1e-6 + (1e-2 - 1e-6) * (1 + math.cos(math.pi * epoch / 10)) / 2
        assert rate == pytest.approx(expected, rel=1e-5)


def test_multistep_drops_after_each_milestone():
    plan = OptimizerPlan(
        learning_rate=1.0, schedule="multistep", milestones=(2, 3), factor=0.1
    )
    rates = _rates(plan, epochs=4, steps_per_epoch=2)
    np.testing.assert_allclose(rates, [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)


def test_warmup_rises_linearly_and_reaches_the_peak():
    plan = OptimizerPlan(learning_rate=0.8, warmup_epochs=2)
    rates = _rates(plan, epochs=4, steps_per_epoch=2)
    np.testing.assert_allclose(
        rates, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8], rtol=1e-6
    )


def test_linear_ends_where_it_is_told():
    plan = OptimizerPlan(learning_rate=1.0, schedule="linear", end_learning_rate=0.5)
    schedule = optimizers.learning_rate(plan, epochs=2, steps_per_epoch=5)
    assert float(schedule(jnp.asarray(0))) == 1.0
    assert float(schedule(jnp.asarray(5))) == pytest.approx(0.75)
    assert float(schedule(jnp.asarray(10))) == pytest.approx(0.5)


def test_warmup_longer_than_training_is_refused():
    plan = OptimizerPlan(learning_rate=1.0, warmup_epochs=3)
    with pytest.raises(ValueError, match="warmup_epochs 3 must be below epochs 3"):
        optimizers.learning_rate(plan, epochs=3, steps_per_epoch=5)


def test_milestones_beyond_the_end_are_refused():
    plan = OptimizerPlan(learning_rate=1.0, schedule="multistep", milestones=(2, 5))
    with pytest.raises(ValueError, match="milestone 5 is never reached in 5 epochs"):
        optimizers.learning_rate(plan, epochs=5, steps_per_epoch=3)


PARAMS = {"kernel": np.array([[1.0, -2.0]]), "bias": np.array([0.5])}
GRADS = [
    {"kernel": np.array([[0.3, 0.1]]), "bias": np.array([-0.2])},
    {"kernel": np.array([[-0.1, 0.4]]), "bias": np.array([0.6])},
]


def _train(plan):
    tx = optimizers.optimizer(plan, lambda step: jnp.asarray(plan.learning_rate))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
    state = tx.init(params)
    for grads in GRADS:
        grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def _expected(update):
    params = {k: v.copy() for k, v in PARAMS.items()}
    memory = {k: {} for k in params}
    for t, grads in enumerate(GRADS, 1):
        for k in params:
            params[k] = update(params[k], grads[k], memory[k], t, k)
    return params


def test_sgd_adds_decay_to_the_gradient_before_the_momentum():
    plan = OptimizerPlan(name="sgd", learning_rate=0.1, weight_decay=0.01)

    def update(p, g, m, t, k):
        m["b"] = 0.9 * m.get("b", 0.0) + g + 0.01 * p
        return p - 0.1 * m["b"]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        _train(plan),
        _expected(update),
    )


def test_nesterov_looks_ahead():
    plan = OptimizerPlan(name="sgd", learning_rate=0.1, nesterov=True)

    def update(p, g, m, t, k):
        m["b"] = 0.9 * m.get("b", 0.0) + g
        return p - 0.1 * (g + 0.9 * m["b"])

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        _train(plan),
        _expected(update),
    )


def _adam(p, g, m, t, *, coupled, decoupled):
    g = g + coupled * p
    m["m"] = 0.9 * m.get("m", 0.0) + 0.1 * g
    m["v"] = 0.999 * m.get("v", 0.0) + 0.001 * g**2
    mhat, vhat = m["m"] / (1 - 0.9**t), m["v"] / (1 - 0.999**t)
    return mhat / (np.sqrt(vhat) + 1e-8) + decoupled * p


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_couples_the_decay_and_adamw_does_not(name):
    plan = OptimizerPlan(name=name, learning_rate=0.1, weight_decay=0.05)
    decay = {"coupled" if name == "adam" else "decoupled": 0.05}
    decay = {"coupled": 0.0, "decoupled": 0.0, **decay}

    def update(p, g, m, t, k):
        return p - 0.1 * _adam(p, g, m, t, **decay)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5),
        _train(plan),
        _expected(update),
    )


def test_lamb_scales_each_update_to_the_norm_of_its_parameter():
    plan = OptimizerPlan(name="lamb", learning_rate=0.1, weight_decay=0.05)

    def update(p, g, m, t, k):
        u = _adam(p, g, m, t, coupled=0.0, decoupled=0.05)
        return p - 0.1 * u * np.linalg.norm(p) / np.linalg.norm(u)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5),
        _train(plan),
        _expected(update),
    )


def test_the_kernel_mask_spares_biases():
    plan = OptimizerPlan(
        name="sgd",
        learning_rate=0.1,
        momentum=0.0,
        weight_decay=0.5,
        weight_decay_mask="kernels",
    )

    def update(p, g, m, t, k):
        return p - 0.1 * (g + (0.5 * p if k == "kernel" else 0.0))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        _train(plan),
        _expected(update),
    )


def test_clipping_bounds_the_global_norm():
    plan = OptimizerPlan(name="sgd", learning_rate=1.0, momentum=0.0, clip_norm=0.1)
    tx = optimizers.optimizer(plan, lambda step: jnp.asarray(1.0))
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    grads = {"a": jnp.full(3, 2.0), "b": jnp.full(4, -1.0)}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.1, rel=1e-5)


def test_loss_weights_are_numbers_or_schedules():
    assert optimizers.loss_weight(2, steps_per_epoch=5) == 2.0
    weight = optimizers.loss_weight(
        {"schedule": "linear", "start": 1.0, "end": 0.0, "epochs": 2},
        steps_per_epoch=5,
    )
    assert callable(weight)
    values = [float(weight(jnp.asarray(s))) for s in (0, 5, 10, 50)]
    np.testing.assert_allclose(values, [1.0, 0.5, 0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "values"), [("step", [0, 0, 1, 1]), ("cosine", [0, 0.5, 1, 1])]
)
def test_weight_schedules_wait_and_then_change(kind, values):
    weight = optimizers.loss_weight(
        {"schedule": kind, "start": 0, "end": 1, "epochs": 2, "delay_epochs": 1},
        steps_per_epoch=1,
    )
    assert callable(weight)
    assert float(weight(jnp.asarray(0))) == 0.0
    got = [float(weight(jnp.asarray(s))) for s in (1, 2, 3, 9)]
    np.testing.assert_allclose(got, values, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("big", TypeError, "weight must be a number or a schedule, got 'big'"),
        (True, TypeError, "weight must be a number"),
        ({"schedule": "linear"}, TypeError, "needs the option 'start'"),
        (
            {"schedule": "linear", "start": 0, "end": 1, "epochs": 0},
            ValueError,
            "epochs of a weight schedule must be > 0",
        ),
        (
            {"schedule": "ramp", "start": 0, "end": 1, "epochs": 1},
            TypeError,
            "must be one of 'linear', 'cosine', 'step', got 'ramp'",
        ),
    ],
)
def test_impossible_weights_are_refused(value, error, message):
    with pytest.raises(error, match=message):
        optimizers.loss_weight(value, steps_per_epoch=5)
