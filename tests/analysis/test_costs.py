"""The cost counter against closed forms and published numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models
from jaxkd.analysis import Costs, count_costs, network_costs


def shape(*size):
    return jax.ShapeDtypeStruct(size, jnp.float32)


def macs(function, *args):
    return count_costs(function, *args).macs


def convolution(stride=1, padding="SAME", **options):
    return functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **options,
    )


def test_matrix_products():
    assert macs(jnp.dot, shape(2, 3), shape(3, 5)) == 2 * 3 * 5
    batched = functools.partial(jnp.einsum, "bij,bjk->bik")
    assert macs(batched, shape(7, 2, 3), shape(7, 3, 5)) == 7 * 2 * 3 * 5
    contract_all = functools.partial(jnp.einsum, "ij,ij->")
    assert macs(contract_all, shape(4, 6), shape(4, 6)) == 24


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (1, 4), (2, 8)])
def test_convolutions(stride, groups):
    conv = convolution(stride, feature_group_count=groups)
    count = macs(conv, shape(2, 12, 10, 8), shape(3, 5, 8 // groups, 16))
    assert count == 2 * (12 // stride) * (10 // stride) * 15 * (8 // groups) * 16


def test_a_kernel_with_holes_costs_what_it_multiplies():
    conv = convolution(rhs_dilation=(2, 2))
    assert macs(conv, shape(1, 8, 8, 3), shape(3, 3, 3, 5)) == 64 * 9 * 15


@pytest.mark.parametrize("size, kernel, stride", [(5, 4, 2), (4, 3, 3), (6, 2, 2)])
def test_a_transposed_convolution_skips_the_inserted_zeros(size, kernel, stride):
    def transposed(x, k):
        return jax.lax.conv_transpose(
            x, k, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    # Every input pixel meets every kernel pixel once.
    inner = size**2 * kernel**2 * 3 * 7
    count = macs(transposed, shape(1, size, size, 3), shape(kernel, kernel, 3, 7))
    assert inner <= count <= inner * ((size + 2) / size) ** 2


def test_gradients_of_a_convolution_cost_two_more():
    def loss(x, kernel):
        return jnp.sum(convolution(padding="VALID")(x, kernel) ** 2)

    x, kernel = shape(2, 9, 9, 4), shape(3, 3, 4, 8)
    forward = 2 * 49 * 9 * 4 * 8
    assert macs(loss, x, kernel) == forward
    # The kernel's gradient repeats the forward count; the image's also multiplies
    # padding: 81 pixels instead of 49.
    assert macs(jax.grad(loss, argnums=1), x, kernel) == 2 * forward
    both = forward * 2 + 2 * 81 * 9 * 4 * 8
    assert macs(jax.grad(loss, argnums=(0, 1)), x, kernel) == both


def test_wrapped_functions_count_like_plain_ones():
    own_gradient = jax.custom_vjp(jnp.matmul)
    own_gradient.defvjp(lambda x, y: (x @ y, (x, y)), lambda r, g: (g @ r[1].T, g))
    own_tangent = jax.custom_jvp(jnp.matmul)
    own_tangent.defjvp(lambda primals, tangents: (primals[0] @ primals[1], tangents))
    args = shape(3, 4), shape(4, 5)
    for function in (
        own_gradient,
        own_tangent,
        jax.jit(jnp.matmul),
        jax.checkpoint(jnp.matmul),
        jax.jit(jax.checkpoint(jax.jit(jnp.matmul))),
    ):
        assert macs(function, *args) == 60


def test_loops_and_branches():
    square = shape(4, 4)

    def scanned(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0]

    def looped(x):
        return jax.lax.fori_loop(0, 3, lambda i, c: c @ c, x)

    def branched(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert macs(scanned, square) == 5 * 64
    assert macs(looped, square) == 3 * 64
    assert macs(branched, square) == 2 * 64


def test_a_loop_of_unknown_length_is_refused_if_it_multiplies():
    def unknown(body):
        return lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 9, body, x)

    with pytest.raises(ValueError, match="cannot count the matrix products of a while"):
        macs(unknown(lambda c: c @ c), shape(2, 2))
    assert macs(unknown(lambda c: c + 1), shape(2, 2)) == 0


def test_results_nobody_reads_cost_nothing():
    def wasteful(x, y):
        jax.jit(jnp.matmul)(x, x)
        read, _ = jax.jit(lambda x, y: (x @ y, (x @ x) @ y))(x, y)
        return read

    assert macs(wasteful, shape(4, 4), shape(4, 4)) == 64


@pytest.mark.parametrize(
    "name, published, tolerance",
    [("resnet18", 1.814e9, 1e-3), ("resnet50", 4.089e9, 1e-3)],
)
def test_published_counts_at_224_pixels(name, published, tolerance):
    network = models.create(name, num_classes=1000)
    costs = network_costs(network, (224, 224, 3))
    assert costs.macs == pytest.approx(published, rel=tolerance)


def test_a_cifar_network_counted_by_hand():
    stem = 32 * 32 * 27 * 16
    stage1 = 2 * 32 * 32 * 9 * 16 * 16
    stage2 = 16 * 16 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32)
    stage3 = 8 * 8 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64)
    params = 27 * 16 + 2 * 9 * 16**2 + 9 * 16 * 32 + 9 * 32**2 + 16 * 32
    params += 9 * 32 * 64 + 9 * 64**2 + 32 * 64 + 64 * 10 + 10
    params += 2 * (16 + 2 * 16 + 3 * 32 + 3 * 64)
    network = models.create("resnet8", num_classes=10)
    expected = Costs(macs=stem + stage1 + stage2 + stage3 + 640, params=params)
    assert network_costs(network, (32, 32, 3)) == expected


def test_only_taps_that_are_read_are_counted():
    network = models.create("unet", num_classes=2, width_factor=1 / 16)
    v = jax.eval_shape(network.init, jax.random.key(0), shape(1, 32, 32, 1))

    def first_tap(v, x):
        return network.apply(v, x).taps["e1"]

    encoder1 = 32 * 32 * 9 * (1 * 4 + 4 * 4)
    assert macs(first_tap, v, shape(1, 32, 32, 1)) == encoder1
    alone = network_costs(network, (32, 32, 1)).macs
    assert network_costs(network, (32, 32, 1), reads=["e1", "d5"]).macs == alone
    with pytest.raises(KeyError, match="the network has no tap 'e9'; it has e1, e2"):
        network_costs(network, (32, 32, 1), reads=["e9"])


def test_counting_agrees_with_the_compiler_on_a_plain_convolution():
    conv = convolution(padding="VALID")
    args = shape(2, 16, 16, 8), shape(3, 3, 8, 16)
    analysis = jax.jit(conv).lower(*args).compile().cost_analysis()
    np.testing.assert_allclose(analysis["flops"], 2 * macs(conv, *args), rtol=1e-3)


def test_of_platform_dependent_functions_the_default_counts():
    x = jnp.zeros((3, 3))

    def twice(x):
        return x @ x @ x

    def once(x):
        return x @ x

    for special, default, macs in ((twice, once, 27), (once, twice, 54)):

        def run(x, special=special, default=default):
            return jax.lax.platform_dependent(x, cpu=special, default=default)

        assert count_costs(run, x).macs == macs
