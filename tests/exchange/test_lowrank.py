"""PowerSGD: products, errors, ranks, and what it sends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.analysis.collectives import read_collectives, sum_up
from jaxkd.exchange import powersgd, with_ranks
from jaxkd.exchange.lowrank import (
    compressible,
    from_matrix,
    gram_schmidt,
    low_rank_round,
    orthonormalised,
    to_matrix,
)

KEY = jax.random.key(0)


def test_columns_become_orthonormal_and_span_what_they_did():
    matrix = jax.random.normal(KEY, (7, 3))
    for made in (gram_schmidt(matrix), orthonormalised(matrix)):
        np.testing.assert_allclose(made.T @ made, np.eye(3), atol=1e-6)
        np.testing.assert_allclose(made @ (made.T @ matrix), matrix, atol=1e-5)
    # The two differ in signs alone.
    a, b = gram_schmidt(matrix), orthonormalised(matrix)
    np.testing.assert_allclose(np.abs(a), np.abs(b), atol=1e-5)


def test_zeros_stay_zeros_instead_of_becoming_no_numbers():
    assert (gram_schmidt(jnp.zeros((4, 2))) == 0).all()
    product, right = low_rank_round(jnp.zeros((4, 5)), jnp.ones((5, 2)))
    assert (product == 0).all() and jnp.isfinite(right).all()


def test_a_matrix_of_that_rank_is_found_in_two_rounds():
    left, right = jax.random.normal(KEY, (9, 2)), jax.random.normal(KEY, (2, 11))
    matrix = left @ right
    start = jax.random.normal(jax.random.key(1), (11, 2))
    product, start = low_rank_round(matrix, start)
    product, _ = low_rank_round(matrix, start)
    np.testing.assert_allclose(product, matrix, atol=1e-4)


def test_kernels_are_matrices_of_outputs():
    kernel = jnp.arange(24.0).reshape(2, 1, 3, 4)
    matrix = to_matrix(kernel)
    assert matrix.shape == (4, 6)
    np.testing.assert_array_equal(matrix[2], kernel[..., 2].ravel())
    np.testing.assert_array_equal(from_matrix(matrix, kernel.shape), kernel)


def test_only_what_becomes_half_as_large_is_compressed(params):
    arrays = {"a": jnp.zeros((40, 30)), "b": jnp.zeros(900), "c": jnp.zeros((4, 4))}
    # 2 * 8 * (40 + 30) = 1120 < 1200, but 2 * 9 * 70 is not.
    assert compressible(arrays, 8) == {"a": 8}
    assert compressible(arrays, 9) == {}
    with pytest.raises(ValueError, match="no parameter is large enough for rank 9"):
        powersgd(rank=9).init(arrays)


def reference(gradients, right, steps):
    """What workers apply to one matrix, in numpy."""
    workers = len(gradients[0])
    error = [np.zeros(gradients[0][0].shape) for _ in range(workers)]
    results = []
    for step in range(steps):
        total = [gradients[step][w] + error[w] for w in range(workers)]
        q, _ = np.linalg.qr(right)
        p, _ = np.linalg.qr(np.mean([t @ q for t in total], axis=0))
        right = np.mean([t.T @ p for t in total], axis=0)
        results.append(p @ right.T)
        error = [t - results[-1] for t in total]
    return results, error


def test_workers_apply_what_the_reference_says(params, drawn, copies, workers):
    exchange = powersgd(rank=3)
    state = exchange.init(params)
    assert set(state.right) == {"head/kernel", "conv/kernel"}
    gradients = [drawn(i, 4) for i in range(3)]
    matrices = [np.asarray(g["head"]["kernel"]).swapaxes(1, 2) for g in gradients]
    right = np.asarray(state.right["head/kernel"])
    want, error = reference(matrices, right, 3)
    step, state = workers(exchange), copies(state, 4)
    for i, g in enumerate(gradients):
        new, state = step(g, state, i, KEY)
        np.testing.assert_allclose(new["head"]["kernel"][0].T, want[i], atol=2e-4)
        mean = g["conv"]["bias"].mean(0)
        np.testing.assert_allclose(new["conv"]["bias"][1], mean, atol=1e-6)
    np.testing.assert_allclose(state.error["head/kernel"], error, atol=2e-4)


def test_the_first_steps_average_whole_gradients(params, drawn, copies, workers):
    exchange = powersgd(rank=2, start_step=1)
    step, state = workers(exchange), copies(exchange.init(params))
    gradients = drawn(0)
    new, after = step(gradients, state, 0, KEY)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a[0], b.mean(0), atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    new, _ = step(gradients, state, 1, KEY)
    assert np.linalg.matrix_rank(new["head"]["kernel"][0], tol=1e-4) == 2


def test_bytes_of_the_compiled_exchange_are_those_counted_by_hand(
    params, drawn, copies, on_devices
):
    exchange = powersgd(rank=3)
    program = on_devices(exchange, drawn(0), copies(exchange.init(params)), 0, KEY)
    found = sum_up(read_collectives(program))
    # Both factors of [8, 36] and [30, 40], the bias, and whether all is finite.
    assert found["all-reduce"].bytes == 4 * (3 * (8 + 36) + 3 * (30 + 40) + 8 + 1)
    assert set(found) == {"all-reduce"}


def test_ranks_of_layers_and_their_change(params, drawn, copies, workers):
    exchange = powersgd(ranks={"head/kernel": 5, "conv/kernel": 99})
    state = exchange.init(params)
    # No rank is above the smaller side.
    assert state.right["head/kernel"].shape == (40, 5)
    assert state.right["conv/kernel"].shape == (36, 8)
    state = copies(state)
    _, state = workers(exchange)(drawn(0), state, 0, KEY)
    ranks = {"head/kernel": 2, "conv/kernel": 1}
    changed = with_ranks(state, ranks, seed=1)
    assert changed.right["head/kernel"].shape == (8, 40, 2)
    assert (changed.right["head/kernel"][0] == changed.right["head/kernel"][7]).all()
    jax.tree.map(np.testing.assert_array_equal, changed.error, state.error)
    new, _ = workers(powersgd(ranks=ranks))(drawn(1), changed, 1, KEY)
    assert np.linalg.matrix_rank(new["head"]["kernel"][0], tol=1e-4) == 2
    with pytest.raises(ValueError, match="ranks must name"):
        with_ranks(state, {"head/kernel": 2}, seed=1)


def test_a_gradient_that_is_not_finite_does_not_stay(params, drawn, copies, workers):
    exchange = powersgd(rank=2)
    step, state = workers(exchange), copies(exchange.init(params))
    broken = jax.tree.map(lambda g: g.at[1].set(jnp.inf), drawn(0))
    new, after = step(broken, state, 0, KEY)
    assert all((x == 0).all() for x in jax.tree.leaves(new))
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"ranks": {}}, "ranks must name tensors"),
        ({"start_step": -1}, "start_step must be >= 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        powersgd(**options)


def test_ranks_of_unknown_tensors_are_refused(params):
    with pytest.raises(ValueError, match="'conv/bias', which is no tensor of 2 axes"):
        powersgd(ranks={"conv/bias": 2}).init(params)
