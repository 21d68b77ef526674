"""Exchanges by name, and arrays by path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import exchange
from jaxkd.exchange.base import by_path, in_tree


def not_an_exchange() -> dict:
    """What a user's own function must not return."""
    return {}


def test_exchanges_are_found_by_name():
    assert set(exchange.names()) >= {"dgc", "powersgd", "quantized"}
    assert isinstance(exchange.create("powersgd", rank=2), exchange.Exchange)
    assert exchange.create("dgc").has_momentum
    assert not exchange.create("powersgd").has_momentum


def test_mistakes_are_named():
    with pytest.raises(KeyError, match="did you mean 'powersgd'"):
        exchange.create("powersdg")
    with pytest.raises(TypeError, match="has no option 'ranke'"):
        exchange.create("powersgd", ranke=2)
    with pytest.raises(TypeError, match="must return a jaxkd.exchange.Exchange"):
        exchange.create(f"{__name__}:not_an_exchange")


def test_arrays_by_path_go_back_to_their_places():
    tree = {"b": {"kernel": jnp.ones(2)}, "a": [jnp.zeros(1), jnp.ones(3)]}
    arrays = by_path(tree)
    assert set(arrays) == {"b/kernel", "a/0", "a/1"}
    back = in_tree({p: x + 1 for p, x in arrays.items()}, tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    np.testing.assert_array_equal(back["b"]["kernel"], [2, 2])
