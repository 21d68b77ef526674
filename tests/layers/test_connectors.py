"""Connectors against the formulas of their papers, written in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.layers import connectors


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def first_values(module, *inputs):
    return module.init(jax.random.key(0), *inputs, False)


def init(module, *inputs):
    """Variables drawn in numpy: compiling the module's own initialisation is slow."""
    shapes = jax.eval_shape(lambda *x: first_values(module, *x), *inputs)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(-0.5, 0.5, x.shape), x.dtype), shapes
    )


def apply(module, variables, *inputs):
    """The output in training mode, and the statistics after the call."""

    def function(variables, *inputs):
        return module.apply(variables, *inputs, True, mutable=["batch_stats"])

    return jax.jit(function)(variables, *inputs)


def run(module, *inputs):
    """The module's output, its parameters, and its statistics after the call."""
    variables = init(module, *inputs)
    output, updated = apply(module, variables, *inputs)
    return output, variables["params"], updated


def normalized(x, norm):
    """Batch norm with the statistics of the batch."""
    x = np.float64(x)
    axes = tuple(range(x.ndim - 1))
    unit = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5)
    return unit * np.float64(norm["scale"]) + np.float64(norm["bias"])


def convolved(x, kernel, *, stride=1, padding=0):
    """Correlation, pixel by pixel."""
    x = np.pad(np.float64(x), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    kh, kw = kernel.shape[:2]
    rows = range(0, x.shape[1] - kh + 1, stride)
    columns = range(0, x.shape[2] - kw + 1, stride)
    return np.stack(
        [
            np.stack(
                [
                    np.tensordot(x[:, i : i + kh, j : j + kw], np.float64(kernel), 3)
                    for j in columns
                ],
                axis=1,
            )
            for i in rows
        ],
        axis=1,
    )


def test_conv_norm_is_a_normalized_projection():
    x = normal(3, 4, 5, 2)
    y, params, updated = run(connectors.ConvNorm(6), x)
    kernel = params["conv"]["kernel"][0, 0]
    np.testing.assert_allclose(
        y,
        normalized(np.float64(x) @ np.float64(kernel), params["norm"]),
        rtol=1e-4,
        atol=1e-5,
    )
    assert "bias" not in params["conv"]
    assert jnp.any(updated["batch_stats"]["norm"]["mean"] != 0)
    rectified, _, _ = run(connectors.ConvNorm(6, relu=True), x)
    np.testing.assert_allclose(rectified, np.maximum(y, 0), rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "target", "kernel", "options"),
    [
        ((4, 5), (4, 5), (1, 1), {}),
        ((8, 6), (4, 3), (3, 3), {"stride": 2, "padding": 1}),
        ((7, 7), (4, 4), (4, 4), {}),
        ((7, 5), (4, 5), (4, 1), {}),
    ],
)
def test_hint_regressor_reaches_the_teachers_size(size, target, kernel, options):
    x = normal(2, *size, 3)
    y, params, _ = run(connectors.HintRegressor(4, target), x)
    assert y.shape == (2, *target, 4)
    assert params["conv"]["kernel"].shape == (*kernel, 3, 4)
    # The norm removes the bias.
    z = convolved(x, params["conv"]["kernel"], **options)
    expected = normalized(z, params["norm"])
    np.testing.assert_allclose(y, np.maximum(expected, 0), rtol=1e-4, atol=1e-5)


def test_hint_regressor_doubles_small_maps_by_a_transposed_convolution():
    x = normal(2, 3, 4, 3)
    y, params, _ = run(connectors.HintRegressor(5, (6, 8)), x)
    assert params["conv"]["kernel"].shape == (4, 4, 3, 5)
    # Each pixel is followed by a zero, then a 4x4 window slides over all of it.
    spread = np.zeros((2, 5, 7, 3))
    spread[:, ::2, ::2] = x
    z = convolved(spread, params["conv"]["kernel"], padding=2)
    expected = normalized(z, params["norm"])
    np.testing.assert_allclose(y, np.maximum(expected, 0), rtol=1e-4, atol=1e-5)


def test_hint_regressor_knows_what_it_cannot_enlarge():
    assert not connectors.HintRegressor.fits((4, 4), (7, 7))
    assert not connectors.HintRegressor.fits((4, 4), (8, 4))
    with pytest.raises(ValueError, match="from maps of 4x4 to 7x7"):
        run(connectors.HintRegressor(3, (7, 7)), normal(2, 4, 4, 3))


def test_variational_regressor_is_three_projections():
    x = normal(2, 3, 3, 2)
    (mean, _), params, _ = run(connectors.VariationalRegressor(4), x)
    z = np.float64(x)
    for i in range(3):
        z = np.maximum(z, 0) if i else z
        z = z @ np.float64(params[f"conv{i}"]["kernel"][0, 0])
    np.testing.assert_allclose(mean, z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variance", [0.3, 5.0, 1000.0])
def test_variational_regressor_starts_at_the_given_variance(variance):
    module = connectors.VariationalRegressor(1, variance=variance, epsilon=0.1)
    log_scale = first_values(module, normal(1, 1, 1, 1))["params"]["log_scale"]
    start = np.logaddexp(0, np.float64(log_scale)) + 0.1
    np.testing.assert_allclose(start, variance, rtol=1e-5)


def test_fixed_variances_are_no_parameters():
    module = connectors.VariationalRegressor(1, train_variance=False)
    variables = first_values(module, normal(1, 1, 1, 1))
    assert "log_scale" not in variables["params"]
    (log_scale,) = variables["constants"]["log_scale"]
    assert np.log1p(np.exp(log_scale)) + 1e-5 == pytest.approx(5.0)


def test_masked_generator_never_sees_what_is_masked():
    module = connectors.MaskedGenerator(4)
    keep = jnp.array([1.0, 0.0, 1.0, 1.0]).reshape(1, 1, 1, 4)
    x = normal(2, 3, 3, 4)
    variables = init(module, x, keep)
    assert set(variables["params"]) == {"conv0", "conv1"}
    output, hidden, seen = (
        apply(module, variables, y, keep)[0]
        for y in (x, x.at[..., 1].add(1.0), x.at[..., 2].add(1.0))
    )
    np.testing.assert_array_equal(output, hidden)
    assert jnp.any(output != seen)


def test_masked_generator_is_two_convolutions_of_the_aligned_map():
    x, keep = normal(2, 3, 4, 2), jnp.ones((2, 3, 4, 1)).at[0, 1, 2].set(0.0)
    y, params, _ = run(connectors.MaskedGenerator(5), x, keep)
    align = params["align"]
    z = np.float64(x) @ np.float64(align["kernel"][0, 0]) + np.float64(align["bias"])
    z = convolved(z * np.float64(keep), params["conv0"]["kernel"], padding=1)
    z = np.maximum(z + np.float64(params["conv0"]["bias"]), 0)
    z = convolved(z, params["conv1"]["kernel"], padding=1)
    expected = z + np.float64(params["conv1"]["bias"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_connectors_start_as_pytorch_does():
    module = connectors.MaskedGenerator(3, learned_fill=True)
    variables = first_values(module, normal(1, 1, 1, 2), jnp.ones((1, 1, 1, 1)))
    params = variables["params"]
    np.testing.assert_array_equal(params["fill"], 0)
    for name, fan_in in {"align": 2, "conv0": 27, "conv1": 27}.items():
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        bound = fan_in**-0.5
        assert 0.8 * bound * (kernel.size > 20) < jnp.abs(kernel).max() <= bound
        assert 0 < jnp.abs(bias).max() <= bound


def test_masked_generator_fills_masked_places_with_a_learned_vector():
    module = connectors.MaskedGenerator(3, learned_fill=True)
    x, keep = normal(2, 2, 2, 3), jnp.zeros((2, 2, 2, 1)).at[:, 0].set(1.0)
    params = init(module, x, keep)["params"]
    filled = {**params, "fill": jnp.full((1, 1, 1, 3), 2.0)}
    replaced = jnp.where(keep > 0, x, 2.0)
    expected, _ = apply(module, {"params": params}, replaced, jnp.ones_like(keep))
    got, _ = apply(module, {"params": filled}, x, keep)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_projector_is_narrow_inside_and_pools_large_maps():
    x = normal(2, 6, 3, 5)
    y, params, updated = run(connectors.Projector(8, 4, (3, 4)), x)
    assert y.shape == (2, 3, 3, 8)
    kernels = [params[f"conv{i}"]["kernel"].shape for i in range(3)]
    assert kernels == [(1, 1, 5, 2), (3, 3, 2, 2), (1, 1, 2, 8)]
    assert jnp.all(y >= 0)
    pooled = jnp.mean(x.reshape(2, 3, 2, 3, 5), axis=2)
    again, _, _ = run(connectors.Projector(8, 4, (3, 3)), pooled)
    np.testing.assert_allclose(y, again, rtol=1e-5, atol=1e-6)
    assert set(updated["batch_stats"]) == {"norm0", "norm1", "norm2"}


def test_review_hands_the_fused_map_from_deep_to_shallow():
    maps = [normal(2, 4, 4, 3), normal(2, 2, 2, 5), normal(2, 1, 1, 6)]
    module = connectors.Review(4, [7, 8, 9], [(4, 4), (2, 2), (1, 1)])
    variables = init(module, *maps)
    # "block0" is the deepest, and the only one without attention.
    params = variables["params"]
    assert ["attention" in params[f"block{i}"] for i in range(3)] == [False, True, True]
    before, _ = apply(module, variables, *maps)
    assert [y.shape for y in before] == [(2, 4, 4, 7), (2, 2, 2, 8), (2, 1, 1, 9)]

    def changed(level):
        others = [*maps[:level], -2 * maps[level], *maps[level + 1 :]]
        after, _ = apply(module, variables, *others)
        return [bool(jnp.any(a != b)) for a, b in zip(after, before, strict=True)]

    assert changed(0) == [True, False, False]
    assert changed(1) == [True, True, False]
    assert changed(2) == [True, True, True]


def test_review_block_follows_its_equations():
    x, deeper = normal(2, 4, 4, 3), normal(2, 2, 2, 5, seed=1)
    module = connectors.ReviewBlock(5, 6, (4, 4))
    variables = init(module, x, deeper)
    (output, handed), _ = apply(module, variables, x, deeper)
    params = variables["params"]
    z = np.float64(x) @ np.float64(params["conv1"]["kernel"][0, 0])
    z = normalized(z, params["norm1"])
    y = np.float64(deeper).repeat(2, axis=1).repeat(2, axis=2)
    kernel = np.float64(params["attention"]["kernel"][0, 0])
    logits = np.concatenate([z, y], -1) @ kernel + np.float64(
        params["attention"]["bias"]
    )
    a = 1 / (1 + np.exp(-logits))
    z = z * a[..., :1] + y * a[..., 1:]
    np.testing.assert_allclose(handed, z, rtol=1e-4, atol=1e-5)
    z = convolved(z, params["conv2"]["kernel"], padding=1)
    expected = normalized(z, params["norm2"])
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


def test_review_resizes_to_the_teacher():
    module = connectors.Review(4, [7, 8], [(3, 5), (1, 1)])
    inputs = normal(2, 4, 4, 3), normal(2, 1, 1, 6)
    shapes = jax.eval_shape(lambda *x: first_values(module, *x), *inputs)
    y, _ = jax.eval_shape(lambda v: apply(module, v, *inputs), shapes)
    assert [output.shape for output in y] == [(2, 3, 5, 7), (2, 1, 1, 8)]


@pytest.mark.parametrize(
    ("tokens", "grid"),
    [(1, (0, 1)), (5, (1, 2)), (6, (2, 2)), (16, (0, 4)), (198, (2, 14)), (12, None)],
)
def test_token_grid_allows_two_tokens_before_a_square(tokens, grid):
    assert connectors.token_grid(tokens) == grid


def test_tokens_and_maps_are_the_same_pixels():
    patches = normal(2, 3, 3, 4)
    tokens = connectors.map_to_tokens(patches)
    np.testing.assert_array_equal(tokens[:, 4], patches[:, 1, 1])
    prefixed = jnp.concatenate([normal(2, 2, 4, seed=1), tokens], axis=1)
    np.testing.assert_array_equal(connectors.tokens_to_map(prefixed), patches)
    with pytest.raises(ValueError, match="12 tokens are no square grid"):
        connectors.tokens_to_map(normal(1, 12, 4))


def test_shrink_to_pools_only_what_is_larger():
    x = normal(2, 6, 2, 3)
    y = connectors.shrink_to(x, (3, 5))
    assert y.shape == (2, 3, 2, 3)
    np.testing.assert_allclose(y, x.reshape(2, 3, 2, 2, 3).mean(2), rtol=1e-5)


@pytest.mark.parametrize(
    "module",
    [
        connectors.ConvNorm(4),
        connectors.HintRegressor(4, (2, 2)),
        connectors.Projector(4, 2, (4, 4)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_parameters_stay_float32_and_results_follow_the_input(module):
    y, params, updated = run(module, normal(2, 4, 4, 3).astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    leaves = jax.tree.leaves((params, updated))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
