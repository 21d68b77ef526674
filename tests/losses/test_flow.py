import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses


def maps(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def test_flow_matrix_is_the_mean_outer_product_of_pixels():
    first, second = maps(0, (2, 3, 2, 4), (2, 3, 2, 5))
    expected = [
        np.mean([np.outer(a[i, j], b[i, j]) for i in range(3) for j in range(2)], 0)
        for a, b in zip(np.asarray(first), np.asarray(second), strict=True)
    ]
    np.testing.assert_allclose(
        losses.flow_matrix(first, second), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("order", [1, -1])
def test_the_larger_layer_is_averaged(order):
    small, large = maps(1, (2, 2, 3, 4), (2, 4, 6, 4))
    pooled = large.reshape(2, 2, 2, 3, 2, 4).mean((2, 4))
    got = losses.flow_matrix(*(small, large)[::order])
    expected = losses.flow_matrix(*(small, pooled)[::order])
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_fsp_is_the_mean_square_over_pairs_of_channels():
    s1, s2, t1, t2 = maps(2, (2, 3, 2, 4), (2, 3, 2, 5), (2, 6, 6, 4), (2, 3, 3, 5))
    difference = losses.flow_matrix(s1, s2) - losses.flow_matrix(t1, t2)
    expected = np.sum(np.square(difference), axis=(1, 2)) / (4 * 5)
    np.testing.assert_allclose(losses.fsp((s1, s2), (t1, t2)), expected, rtol=1e-5)


def test_other_widths_are_refused():
    s1, s2, t2 = maps(3, (2, 2, 2, 4), (2, 2, 2, 5), (2, 2, 2, 6))
    with pytest.raises(ValueError, match=r"student \(2, 4, 5\), teacher \(2, 4, 6\)"):
        losses.fsp((s1, s2), (s1, t2))
