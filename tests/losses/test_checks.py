import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.losses import checks


@pytest.mark.parametrize("value", [0, -1, 0.0, float("nan")])
def test_positive_rejects(value):
    with pytest.raises(ValueError, match=f"^width must be > 0, got {value}$"):
        checks.check_positive("width", value)


@pytest.mark.parametrize("value", [1, 0.5, float("inf")])
def test_positive_accepts(value):
    checks.check_positive("width", value)


def test_positive_lets_traced_values_pass():
    jax.jit(lambda x: checks.check_positive("width", x))(-1.0)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_fraction_rejects(value):
    with pytest.raises(ValueError, match="^share must be between 0 and 1, got"):
        checks.check_fraction("share", value)


@pytest.mark.parametrize("value", [0, 0.3, 1])
def test_fraction_accepts(value):
    checks.check_fraction("share", value)


def test_maps_must_have_four_axes():
    with pytest.raises(ValueError, match=r"features must be .* got shape \(2, 3\)"):
        checks.check_maps(jnp.zeros((2, 3)), what="features")


def test_maps_must_share_the_batch():
    maps = jnp.zeros((2, 3, 3, 1)), jnp.zeros((4, 3, 3, 1))
    with pytest.raises(ValueError, match=r"batch sizes \[2, 4\]"):
        checks.check_maps(*maps, what="features")


def test_no_maps_are_an_error():
    with pytest.raises(ValueError, match="need at least one map"):
        checks.check_maps(what="features")


def test_mask_is_sorted_by_its_shape():
    examples, classes = jnp.ones((4,), bool), jnp.ones((4, 3), bool)
    assert checks.split_mask(None, (4, 3)) == (None, None)
    assert checks.split_mask(examples, (4, 3))[0] is examples
    assert checks.split_mask(classes, (4, 3))[1] is classes


def test_kept_values_shield_the_gradient_from_nan():
    where = jnp.array([True, False])

    def total(x):
        return jnp.sum(checks.keep(jnp.square(x), where))

    gradient = jax.grad(total)(jnp.array([3.0, 2.0]))
    np.testing.assert_array_equal(gradient, [6.0, 0.0])


def test_sums_and_means_keep_the_first_axis():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_array_equal(checks.sum_per_example(x), [15.0, 51.0])
    np.testing.assert_array_equal(checks.mean_per_example(x), [2.5, 8.5])
    np.testing.assert_array_equal(checks.sum_per_example(x[:, 0, 0]), [0.0, 6.0])
