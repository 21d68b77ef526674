"""Runs an exchange on workers that `vmap` simulates, or on real (simulated) devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


@pytest.fixture
def workers():
    """Makes `step(exchange)`: one update of n workers with an axis before arrays."""

    def make(exchange):
        def one(gradients, state, step, key):
            key = jax.random.fold_in(key, jax.lax.axis_index("data"))
            return exchange.update(gradients, state, step=step, key=key)

        return jax.jit(jax.vmap(one, (0, 0, None, None), axis_name="data"))

    return make


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture
def on_devices(mesh):
    """Makes the same of eight devices, compiled for arguments like those given."""

    def make(exchange, *args):
        def one(gradients, state, step, key):
            own, before = jax.tree.map(lambda x: x[0], (gradients, state))
            key = jax.random.fold_in(key, jax.lax.axis_index("data"))
            new, after = exchange.update(own, before, step=step, key=key)
            return new, jax.tree.map(lambda x: x[None], after)

        run = jax.shard_map(
            one,
            mesh=mesh,
            in_specs=(P("data"), P("data"), P(), P()),
            out_specs=(P(), P("data")),
            check_vma=False,
        )
        return jax.jit(run).lower(*args).compile()

    return make


@pytest.fixture
def params():
    """A kernel of a convolution, one of a product, and a bias."""
    return {
        "conv": {"kernel": jnp.zeros((3, 3, 4, 8)), "bias": jnp.zeros(8)},
        "head": {"kernel": jnp.zeros((40, 30))},
    }


@pytest.fixture
def drawn(params):
    """Draws gradients of n workers."""

    def draw(seed, count=8):
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=(count, *x.shape)), jnp.float32),
            params,
        )

    return draw


@pytest.fixture
def copies():
    """The state of every one of n workers, from that of one."""

    def make(state, count=8):
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x, (count, *x.shape)).copy(), state
        )

    return make
