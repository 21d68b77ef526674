"""Wrapping Linen modules into functions of variables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.layers import NetworkSpec, Outputs
from jaxkd.training import from_linen


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(images)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return Outputs(logits=nn.Dense(5)(x.mean((1, 2))), taps={"x": x})


def test_the_spec_holds_shapes_without_the_batch():
    network = from_linen("net", Tiny(), (4, 6, 3))
    assert network.spec == NetworkSpec(name="net", logits=(5,), taps={"x": (4, 6, 3)})
    assert network.spec.num_classes == 5


def test_an_unknown_tap_names_the_known_ones():
    spec = from_linen("net", Tiny(), (4, 4, 3)).spec
    assert spec.tap("x") == (4, 4, 3)
    with pytest.raises(KeyError, match="network 'net' has no tap 'e5'; it has x"):
        spec.tap("e5")


def test_training_updates_statistics_and_uses_dropout_and_evaluation_does_not():
    network = from_linen("net", Tiny(), (4, 4, 3))
    variables = network.init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 4, 4, 3)) + 3.0
    trained, collections = network.apply(
        variables, images, train=True, key=jax.random.key(2)
    )
    mean = collections["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.5 * images.mean((0, 1, 2)), rtol=1e-5)
    assert float((trained.taps["x"] == 0).mean()) > 0.2
    evaluated, same = network.apply(variables, images, train=False, key=None)
    assert not np.any(evaluated.taps["x"] == 0)
    jax.tree.map(
        np.testing.assert_array_equal, same["batch_stats"], variables["batch_stats"]
    )


def test_a_module_that_returns_plain_logits_is_refused():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, images, *, train=False):
            return nn.Dense(2)(images.mean((1, 2)))

    with pytest.raises(TypeError, match=r"'net' must return jaxkd\.layers\.Outputs"):
        from_linen("net", Plain(), (4, 4, 1))


def test_variables_are_float32():
    variables = from_linen("net", Tiny(), (4, 4, 3)).init(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
