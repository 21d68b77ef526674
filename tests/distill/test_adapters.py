import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.distill.adapters import adapter
from jaxkd.distill.modules import apply_module, init_module
from jaxkd.layers import NetworkSpec
from jaxkd.layers.connectors import shrink_to, tokens_to_map
from jaxkd.numerics import resize_bilinear


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def network(name, shape):
    return NetworkSpec(name=name, logits=(5,), taps={"tap": shape})


def choose(source, goal, **options):
    student, teacher = network("small", source), network("big", goal)
    return adapter(student, "tap", teacher, "tap", **options)


def matched(source, goal):
    """Both sides after the adapter, what went in, and the adapter's parameters."""
    chosen = choose(source, goal)
    params, memory = init_module(chosen.module, jax.random.key(0), source)
    student, teacher = normal(2, *source), normal(2, *goal, seed=1)
    output, _ = apply_module(chosen.module, params, memory, student, train=True)
    target = chosen.target(teacher)
    assert output.shape == target.shape == (2, *chosen.shape)
    return output, target, student, params


def projected(x, params):
    layer = params["project"]
    return np.float64(x) @ np.float64(layer["kernel"]) + np.float64(layer["bias"])


@pytest.mark.parametrize(
    ("source", "goal"),
    [
        ((4,), (6,)),
        ((4, 4, 3), (4, 4, 5)),
        ((7, 6, 3), (3, 2, 5)),
        ((2, 3, 3), (5, 6, 5)),
        ((6, 2, 3), (3, 4, 3)),
        ((5, 3), (16, 4)),  # 4 and 16 patches
        ((17, 3), (2, 2, 4)),
        ((4, 4, 3), (6, 4)),
        ((12, 3), (12, 4)),  # no square, but as many
    ],
)
def test_both_sides_get_one_shape(source, goal):
    matched(source, goal)


@pytest.mark.parametrize("shape", [(4,), (4, 4, 3), (12, 3)])
def test_equal_shapes_need_nothing(shape):
    output, _, student, params = matched(shape, shape)
    assert params == {}
    np.testing.assert_array_equal(output, student)


def test_a_projection_can_be_asked_for():
    chosen = choose((4,), (4,), always_project=True)
    params, _ = init_module(chosen.module, jax.random.key(0), (4,))
    assert params["project"]["kernel"].shape == (4, 4)


def test_vectors_go_through_a_dense_layer():
    output, _, student, params = matched((4,), (6,))
    np.testing.assert_allclose(output, projected(student, params), rtol=1e-5, atol=1e-6)


def test_large_maps_are_pooled_and_projected():
    output, _, student, params = matched((7, 6, 3), (3, 2, 5))
    expected = projected(shrink_to(student, (3, 2)), params)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_small_maps_are_projected_and_enlarged():
    output, _, student, params = matched((2, 3, 3), (5, 6, 5))
    # The order makes no difference to the value.
    expected = projected(resize_bilinear(student, (5, 6)), params)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_class_tokens_are_dropped_on_both_sides():
    output, target, student, params = matched((17, 3), (6, 4))
    np.testing.assert_array_equal(target, tokens_to_map(normal(2, 6, 4, seed=1)))
    expected = projected(shrink_to(tokens_to_map(student), (2, 2)), params)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "goal", "reason"),
    [
        ((4,), (4, 4, 3), "a vector has no place in a map or sequence"),
        ((4, 4, 3), (4,), "a vector has no place in a map or sequence"),
        ((4,), (17, 3), "a vector has no place in a map or sequence"),
        ((12, 3), (4, 4, 3), "the tokens are no square grid"),
        ((16, 3), (12, 3), "the tokens are no square grid"),
        ((2, 4, 4, 3), (4, 4, 3), "only vectors, tokens and maps"),
    ],
)
def test_pairs_without_a_right_answer_are_errors(source, goal, reason):
    with pytest.raises(ValueError, match=reason) as error:
        choose(source, goal)
    message = str(error.value)
    for part in ("'small'", "'big'", "'tap'", str(source), str(goal)):
        assert part in message
    assert "\n" not in message
