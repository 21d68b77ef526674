"""Wrapping Linen and NNX modules into functions of variables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxkd.layers import BatchNorm, NetworkSpec, Outputs, Partition
from jaxkd.training import from_linen, from_nnx


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


class Split(nn.Module):
    """Two batch norms, one of which may be frozen."""

    facts_per_image: int = 3

    @nn.compact
    def __call__(self, images, *, train=False):
        x = BatchNorm(name="first")(images, train)
        x = BatchNorm(name="second")(2.0 * x + 1.0, train)
        return Outputs(logits=x.mean((1, 2)), taps={})

    def partition(self):
        return Partition(rules={"kernel": (None, "model")}, units={})

    def facts(self, input_shape):
        return {"bytes": self.facts_per_image * input_shape[0]}


def test_frozen_batch_norms_use_and_keep_their_statistics():
    network = from_linen("net", Split(), (4, 4, 3))
    variables = network.init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 4, 4, 3)) + 3.0
    frozen = network.freeze_norms(("^second",))
    _, collections = frozen(variables, images, train=True, key=None)
    before, after = variables["batch_stats"], collections["batch_stats"]
    assert not np.allclose(after["first"]["mean"], before["first"]["mean"])
    np.testing.assert_array_equal(after["second"]["mean"], before["second"]["mean"])


@pytest.mark.parametrize("pattern", ["second/scale$", "(first|second)/bias"])
def test_batch_norms_are_found_by_the_paths_of_their_parameters(pattern):
    network = from_linen("net", Split(), (4, 4, 3))
    variables = network.init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 4, 4, 3)) + 3.0
    frozen = network.freeze_norms((pattern,))
    _, collections = frozen(variables, images, train=True, key=None)
    before, after = variables["batch_stats"], collections["batch_stats"]
    np.testing.assert_array_equal(after["second"]["mean"], before["second"]["mean"])


def test_batch_norms_of_flax_are_frozen_too_and_none_at_all_is_an_error():
    class Flax(nn.Module):
        @nn.compact
        def __call__(self, images, *, train=False):
            x = nn.BatchNorm(momentum=0.5)(images, use_running_average=not train)
            return Outputs(logits=nn.Dense(5)(x.mean((1, 2))), taps={})

    with pytest.raises(ValueError, match="use_running_average in its constructor"):
        from_linen("net", Tiny(), (4, 4, 3)).freeze_norms(("BatchNorm_0",))
    network = from_linen("net", Flax(), (4, 4, 3))
    variables = network.init(jax.random.key(0))
    frozen = network.freeze_norms(("BatchNorm_0",))
    images = jnp.ones((2, 4, 4, 3))
    _, collections = frozen(variables, images, train=True, key=jax.random.key(1))
    jax.tree.map(
        np.testing.assert_array_equal,
        collections["batch_stats"],
        variables["batch_stats"],
    )
    with pytest.raises(ValueError, match="no batch norm of 'net' has frozen"):
        network.freeze_norms(("Dense_0",))


def test_a_module_may_state_facts_about_itself():
    assert from_linen("net", Split(), (4, 4, 3)).facts == {"bytes": 12}
    assert from_linen("net", Tiny(), (4, 4, 3)).facts == {}


def test_a_module_may_say_how_it_is_split():
    network = from_linen("net", Split(), (4, 4, 3))
    assert network.partition is not None
    assert network.partition.spec("Dense_0/kernel") == (None, "model")
    assert from_linen("net", Tiny(), (4, 4, 3)).partition is None


class TinyNnx(nnx.Module):
    """Batch norm, dropout, and a list of dense layers."""

    def __init__(self, rngs, classes=5):
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, classes, rngs=rngs)])

    def __call__(self, images):
        x = self.dropout(self.norm(images))
        return Outputs(logits=self.layers[0](x.mean((1, 2))), taps={"x": x})


class TestNnx:
    images = jax.random.normal(jax.random.key(1), (2, 4, 4, 3)) + 3.0

    @pytest.fixture
    def network(self):
        return from_nnx("net", TinyNnx, (4, 4, 3))

    def test_the_spec_and_the_names_of_arrays(self, network):
        assert network.spec == NetworkSpec(
            name="net", logits=(5,), taps={"x": (4, 4, 3)}
        )
        variables = jax.eval_shape(network.init, jax.random.key(0))
        assert set(variables["params"]) == {
            "layers/0/kernel",
            "layers/0/bias",
            "norm/scale",
            "norm/bias",
        }
        assert set(variables["state"]) == {"norm/mean", "norm/var"}

    def test_it_gives_what_the_module_gives(self, network):
        module = TinyNnx(nnx.Rngs(jax.random.key(0)))
        module.eval()
        variables = network.init(jax.random.key(0))
        outputs, collections = network.apply(
            variables, self.images, train=False, key=None
        )
        np.testing.assert_allclose(outputs.logits, module(self.images).logits, 1e-6)
        jax.tree.map(
            np.testing.assert_array_equal, collections["state"], variables["state"]
        )

    def test_training_updates_statistics_and_draws_from_the_key(self, network):
        variables = network.init(jax.random.key(0))
        apply = jax.jit(network.apply, static_argnames="train")
        results = [
            apply(variables, self.images, train=True, key=jax.random.key(seed))
            for seed in (2, 2, 3)
        ]
        mean = results[0][1]["state"]["norm/mean"]
        np.testing.assert_allclose(mean, 0.5 * self.images.mean((0, 1, 2)), rtol=1e-5)
        same, again, other = (outputs.taps["x"] for outputs, _ in results)
        np.testing.assert_array_equal(same, again)
        assert not np.array_equal(same == 0, other == 0)

    def test_streams_of_random_numbers_differ(self):
        class Twice(nnx.Module):
            def __init__(self, rngs):
                self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])

            def __call__(self, images):
                first, second = (drop(jnp.ones((8, 32))) for drop in self.drops)
                return Outputs(logits=first, taps={"second": second})

        network = from_nnx("net", Twice, (4, 4, 3))
        variables = network.init(jax.random.key(0))
        outputs, _ = network.apply(
            variables, self.images, train=True, key=jax.random.key(1)
        )
        assert not np.array_equal(outputs.logits == 0, outputs.taps["second"] == 0)

    def test_what_makes_no_nnx_module_is_refused(self):
        with pytest.raises(TypeError, match="'net' must be an nnx.Module, got dict"):
            from_nnx("net", lambda rngs: {}, (4, 4, 3))
