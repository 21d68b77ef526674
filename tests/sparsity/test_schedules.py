"""Schedules by the equations, and changes at the steps that were asked for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.sparsity import schedules


def test_windows_are_fractions_of_the_stage():
    assert schedules.window(1000) == (0, 750)
    assert schedules.window(1001, 0.1, 0.5) == (100, 500)


def test_steps_lie_strictly_between_begin_and_end():
    np.testing.assert_array_equal(schedules.steps_between(0, 750, 250), [250, 500])
    np.testing.assert_array_equal(schedules.steps_between(100, 301, 100), [200, 300])
    np.testing.assert_array_equal(schedules.steps_between(150, 400, 100), [200, 300])
    assert schedules.steps_between(0, 100, 100).size == 0
    np.testing.assert_array_equal(schedules.steps_until(0, 100, 30), [30, 60, 90, 100])
    np.testing.assert_array_equal(schedules.steps_until(0, 90, 30), [30, 60, 90])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.5, 0.5, 1), "0 <= begin < end <= 1, got 0.5 and 0.5"),
        ((-0.1, 0.5, 1), "0 <= begin < end <= 1"),
        ((0.0, 1.1, 1), "0 <= begin < end <= 1"),
        ((0.0, 1.0, 0), "at least 1 step, got 0"),
    ],
)
def test_impossible_windows(values, message):
    with pytest.raises(ValueError, match=message):
        schedules.check_window(*values)


def test_the_cubic_ramp_at_known_points():
    # By hand: half way the distance to the goal is an eighth.
    ramp = dict(initial=0.5, final=0.9, begin=100, end=300)
    found = schedules.cubic_sparsity([0, 100, 200, 300, 999], **ramp)
    np.testing.assert_allclose(found, [0.5, 0.5, 0.85, 0.9, 0.9], rtol=1e-15)
    assert schedules.cubic_sparsity(200, **ramp).shape == ()
    every = schedules.cubic_sparsity(np.arange(100, 301), **ramp)
    assert (np.diff(every) > 0).all() and every.dtype == np.float64


@pytest.mark.parametrize(
    ("anneal", "exponent", "quarter"),
    [
        ("constant", 1.0, 0.3),
        ("cosine", 1.0, 0.3 * (0.5 * math.cos(math.pi / 4) + 0.5)),
        ("exponential", 2.0, 0.3 * math.exp(-0.5)),
        ("power", 3.0, 0.3 * 0.75**3),
    ],
)
def test_drop_fractions(anneal, exponent, quarter):
    found = schedules.drop_fraction(
        [0, 40, 60, 120], begin=40, end=120, anneal=anneal, exponent=exponent
    )
    np.testing.assert_allclose(found[:3], [0.3, 0.3, quarter], rtol=1e-15)
    last = {"constant": 0.3, "exponential": 0.3 * math.exp(-2.0)}.get(anneal, 0.0)
    np.testing.assert_allclose(found[3], last, atol=1e-16)


def test_shares_truncate_as_python_does():
    fractions = np.array([0.15, 0.225, 0.3 * (0.5 * math.cos(math.pi / 3) + 0.5), 0.29])
    share = jax.jit(lambda i, n: schedules.share_of(fractions, i, n))
    for i, fraction in enumerate(fractions):
        for count in (0, 1, 100, 160, 2359296, 14745600):
            found = share(jnp.int32(i), jnp.int32(count))
            assert found.dtype == jnp.int32
            assert found == int(fraction * count), (fraction, count)


def test_shares_in_float32_would_differ():
    # What the test above guards against.
    fraction, count = 0.29, 100
    exact, rounded = int(fraction * count), int(np.float32(fraction) * np.float32(100))
    assert exact == 28 and rounded == 29


def test_changes_happen_at_their_steps_alone():
    def run(step, value):
        return schedules.at_steps(
            np.array([3, 5, 9]), step, lambda i, x: x + 10 * (i + 1), value
        )

    found = [int(jax.jit(run)(jnp.int32(t), jnp.int32(1))) for t in range(11)]
    assert found == [1, 1, 1, 11, 1, 21, 1, 1, 1, 31, 1]
    batched = jax.vmap(run)(jnp.arange(11), jnp.ones(11, jnp.int32))
    assert batched.tolist() == found
    assert schedules.at_steps([], jnp.int32(0), run, "as it was") == "as it was"


def test_other_steps_skip_the_work():
    text = jax.jit(
        lambda step, x: schedules.at_steps([3], step, lambda i, x: jnp.sort(x), x)
    ).lower(jnp.int32(0), jnp.zeros(8))
    assert "case" in text.as_text()  # a branch, not a select of both results
