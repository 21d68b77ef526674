"""What the backward pass recomputes, and what it keeps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxkd.layers import maybe_remat
from jaxkd.layers.remat import KEPT, keep_dots

KINDS = ("none", "dots", "blocks")


class Layers(nn.Module):
    """A convolution, a product, statistics, activations: one of each kind."""

    marked: bool = False

    @nn.compact
    def __call__(self, x, train):
        del train
        y = jnp.tanh(nn.Conv(4, (3, 3), use_bias=False)(x))
        y = y - jnp.mean(y, (1, 2), keepdims=True)
        y = jnp.sin(nn.Dense(5, use_bias=False)(y))
        y = jnp.exp(y)
        if self.marked:
            y = checkpoint_name(y, KEPT)
        scores = jnp.einsum("bhwc,bhvc->bhwv", y, y)
        return jnp.sum(jnp.cos(scores), axis=-1)


def case(remat, **options):
    block = maybe_remat(Layers, remat)(**options)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 7, 3)), jnp.float32)
    variables = block.init(jax.random.key(0), x, True)

    def loss(variables):
        return jnp.sum(block.apply(variables, x, True) ** 2)

    return loss, variables


def kept(remat, **options):
    """Shapes that the pullback holds, apart from parameters and the input."""
    loss, variables = case(remat, **options)
    pull = jax.eval_shape(lambda v: jax.vjp(loss, v)[1], variables)
    given = [(2, 6, 7, 3), *(x.shape for x in jax.tree.leaves(variables))]
    return {x.shape for x in jax.tree.leaves(pull)} - set(given)


def test_dots_keep_convolutions_products_and_sums():
    conv, mean, dense = (2, 6, 7, 4), (2, 4), (2, 6, 7, 5)
    scores, result = (2, 6, 7, 7), (2, 6, 7)
    everything = kept("none")
    assert {conv, dense, scores} <= everything
    # The result is the cotangent's own matter: what is squared outside of the block.
    assert kept("dots") - {mean, result} == {conv, dense}
    assert kept("blocks") - {result} == set()


def test_a_marked_result_is_kept_as_a_product_is():
    shapes = jax.eval_shape(
        lambda v: jax.vjp(case("dots", marked=True)[0], v)[1], case("none")[1]
    )
    count = [x.shape for x in jax.tree.leaves(shapes)].count((2, 6, 7, 5))
    plain = jax.eval_shape(lambda v: jax.vjp(case("dots")[0], v)[1], case("none")[1])
    assert count == 1 + [x.shape for x in jax.tree.leaves(plain)].count((2, 6, 7, 5))


@pytest.mark.parametrize("remat", ["dots", "blocks", True])
def test_numbers_are_those_without(remat):
    loss, variables = case("none")
    expected = jax.value_and_grad(loss)(variables)
    got = jax.value_and_grad(case(remat)[0])(variables)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got, expected
    )


@pytest.mark.parametrize("off", [False, "none"])
def test_none_is_the_block_itself(off):
    assert maybe_remat(Layers, off) is Layers
    assert maybe_remat(Layers, True) is not Layers


def test_the_policy_tells_products_with_batch_axes_apart():
    def policy(axes):
        numbers = (((2,), (1,)), axes)
        return keep_dots(jax.lax.dot_general_p, dimension_numbers=numbers)

    assert policy(((), ()))
    assert not policy(((0,), (0,)))
    assert not keep_dots(jax.lax.exp_p)
