"""The convolution of networks: XLA's own, or the same numbers sooner on a CPU."""

import collections
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxkd import models
from jaxkd.analysis.costs import count_costs, open_jaxpr, sub_jaxprs
from jaxkd.layers import convolution as module
from jaxkd.layers.convolution import Conv, convolution, plain_convolutions
from jaxkd.layers.remat import maybe_remat

NHWC = ("NHWC", "HWIO", "NHWC")
# Images, kernel, strides, padding: each choice of formulations.
CASES = {
    "winograd": ((2, 6, 8, 3), (3, 3, 3, 4), (1, 1), ((1, 1), (1, 1))),
    "pointwise": ((2, 4, 5, 3), (1, 1, 3, 4), (1, 1), "VALID"),
    "pointwise, stride 2": ((2, 6, 6, 3), (1, 1, 3, 4), (2, 2), ((0, 0), (0, 0))),
    "stride 2": ((2, 7, 6, 3), (3, 3, 3, 4), (2, 2), ((1, 1), (1, 1))),
    "same, stride 2": ((2, 6, 6, 3), (3, 3, 3, 4), (2, 2), "SAME"),
    "7x7": ((1, 12, 12, 3), (7, 7, 3, 2), (2, 2), ((3, 3), (3, 3))),
    "one result": ((2, 4, 4, 3), (4, 4, 3, 2), (1, 1), "VALID"),
}


@pytest.fixture
def fast(monkeypatch):
    """As on a single CPU, for convolutions of any size."""
    monkeypatch.setattr(module, "_on_single_cpu", lambda: not module._plain.get())
    monkeypatch.setattr(module, "_FEWEST_PRODUCTS", 0)
    monkeypatch.setattr(module, "_FEWEST_CHANNELS", 0)


@pytest.fixture(params=CASES)
def case(request):
    shape, kernel_shape, strides, padding = CASES[request.param]
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=kernel_shape), jnp.float32)

    def of(convolve):
        return lambda images, kernel: convolve(
            images, kernel, strides, padding, dimension_numbers=NHWC
        )

    return of(convolution), of(jax.lax.conv_general_dilated), images, kernel


def same(results, expected):
    for result, value in zip(
        jax.tree.leaves(results), jax.tree.leaves(expected), strict=True
    ):
        assert result.shape == value.shape and result.dtype == value.dtype
        np.testing.assert_allclose(result, value, rtol=2e-5, atol=5e-5)


def primitives(function, *args):
    """How often each primitive comes, in loops and branches as well."""
    found = collections.Counter()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            found[equation.primitive.name] += 1
            for sub in sub_jaxprs(equation.params):
                walk(open_jaxpr(sub))

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def test_values_and_gradients(fast, case):
    new, old, images, kernel = case
    same(jax.jit(new)(images, kernel), old(images, kernel))

    def gradients(convolve):
        loss = lambda x, k: jnp.sum(jnp.sin(convolve(x, k)))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(images, kernel)

    same(gradients(new), gradients(old))


def test_gradients_of_gradients(fast, case):
    new, old, images, kernel = case

    def second(convolve):
        def penalty(x, k):
            loss = lambda x, k: jnp.sum(jnp.sin(convolve(x, k)))  # noqa: E731
            to_x, to_k = jax.grad(loss, argnums=(0, 1))(x, k)
            return jnp.sum(to_x**2) + jnp.sum(jnp.cos(to_k))

        return jax.jit(jax.grad(penalty, argnums=(0, 1)))(images, kernel)

    results, expected = second(new), second(old)
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-4, atol=2e-3)


def test_several_kernels_at_once(fast, case):
    new, old, images, kernel = case
    kernels = jnp.stack([kernel, -2 * kernel])

    def gradients(convolve):
        def one(k):
            return jax.value_and_grad(lambda k: jnp.sum(convolve(images, k) ** 3))(k)

        return jax.jit(jax.vmap(one))(kernels)

    for result, value in zip(gradients(new), gradients(old), strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    "change",
    [
        dict(feature_group_count=3),
        dict(lhs_dilation=(2, 2)),
        dict(rhs_dilation=(2, 2)),
        dict(dtype=jnp.bfloat16),
        dict(dimension_numbers=("NCHW", "OIHW", "NCHW")),
        dict(preferred_element_type=jnp.float32, dtype=jnp.bfloat16),
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_no_formulation_serves_is_left_to_xla(fast, change):
    change = dict(change)
    dtype = change.pop("dtype", jnp.float32)
    options = {"dimension_numbers": NHWC, **change}
    channels = 3 // options.get("feature_group_count", 1)
    shapes = (2, 6, 6, 3), (3, 3, channels, 6)
    if "NCHW" in options["dimension_numbers"]:
        shapes = (2, 3, 6, 6), (6, channels, 3, 3)
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]

    def of(convolve):
        return lambda x, k: convolve(x, k, (1, 1), [(1, 1), (1, 1)], **options)

    new, old = of(convolution), of(jax.lax.conv_general_dilated)
    np.testing.assert_array_equal(new(*args), old(*args))
    assert str(jax.make_jaxpr(new)(*args)) == str(jax.make_jaxpr(old)(*args))


def test_on_several_devices_it_is_xlas_own(case):
    """The tests run on eight simulated devices, so nothing needs to be pretended."""
    new, old, images, kernel = case
    assert jax.device_count() == 8
    assert str(jax.make_jaxpr(new)(images, kernel)) == str(
        jax.make_jaxpr(old)(images, kernel)
    )
    if len(images) == 2:
        mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
        shared = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
        same(jax.jit(new)(shared, kernel), old(images, kernel))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_other_platforms_hold_xlas_own(fast, case, platform):
    """What a machine with one CPU exports for a GPU is no different."""
    new, old, images, kernel = case

    def operations(convolve):
        loss = lambda x, k: jnp.sum(convolve(x, k) ** 2)  # noqa: E731
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(images, kernel)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")

    assert operations(new) == operations(old)
    assert operations(old)[1] == 0


def test_small_and_symbolic_convolutions_stay_plain(fast, monkeypatch):
    monkeypatch.setattr(module, "_FEWEST_PRODUCTS", 2 * 8 * 8 * 9 * 3 * 4)
    kernel = jnp.ones((3, 3, 3, 4))

    def run(images):
        return convolution(images, kernel, (1, 1), "SAME", dimension_numbers=NHWC)

    assert "dot_general" in primitives(run, jnp.ones((2, 8, 8, 3)))
    assert "dot_general" not in primitives(run, jnp.ones((2, 8, 7, 3)))
    batch = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((*batch, 8, 8, 3), jnp.float32)
    exported = jax.export.export(jax.jit(run))(shape)
    assert "stablehlo.convolution" in exported.mlir_module()


def test_macs_are_those_of_the_plain_network(fast):
    network = models.create("resnet8", num_classes=5)
    images = jnp.zeros((2, 8, 8, 3))
    with plain_convolutions():
        variables = jax.eval_shape(network.init, jax.random.key(0), images)

    def gradient(variables):
        def loss(params):
            outputs, _ = network.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.sum(outputs.logits**2)

        return jax.grad(loss)(variables["params"])

    def program(variables):  # traced anew
        return gradient(variables)

    fast_macs = count_costs(gradient, variables).macs
    with plain_convolutions():
        assert "dot_general" in primitives(program, variables)
        assert count_costs(program, variables).macs == fast_macs


def test_forward_mode_within_plain_convolutions(fast):
    images, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))

    def run(x):
        return convolution(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(run, (images,), (images,))
    with plain_convolutions():
        value, tangent = jax.jvp(run, (images,), (images,))
    np.testing.assert_array_equal(value, tangent)  # linear


class Pair(nn.Module):
    """Two convolutions with something between them to recompute."""

    @nn.compact
    def __call__(self, x, train):
        del train
        x = jnp.tanh(Conv(16, (3, 3), use_bias=False)(x))
        return jnp.sin(Conv(3, (3, 3), use_bias=False)(x))


def test_dots_keeps_what_a_formulation_computes(fast):
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 6, 3)))

    def counts(remat):
        block = maybe_remat(Pair, remat)()
        variables = block.init(jax.random.key(0), images, True)
        loss = lambda v: jnp.sum(block.apply(v, images, True))  # noqa: E731
        return primitives(jax.grad(loss), variables)

    none, dots, blocks = map(counts, ("none", "dots", "blocks"))
    assert dots["dot_general"] == none["dot_general"] < blocks["dot_general"]
    assert dots["tanh"] == blocks["tanh"] > none["tanh"]


STEP = """
import jax, jax.numpy as jnp, numpy as np
from jaxkd import models
from jaxkd.layers import convolution as module
from jaxkd.layers.convolution import plain_convolutions

assert jax.device_count() == 1
network = models.create("resnet8", num_classes=5)
images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 32, 32, 3)), jnp.float32)
variables = network.init(jax.random.key(0), images)

def make_step():
    def step(params):
        def loss(params):
            outputs, _ = network.apply(
                {**variables, "params": params}, images, train=True,
                mutable=["batch_stats"],
            )
            return jnp.mean(outputs.logits**2)
        return jax.value_and_grad(loss)(params)
    return jax.jit(step)

fast = make_step().lower(variables["params"])
with plain_convolutions():
    plain = make_step().lower(variables["params"])
left = [low.as_text().count("stablehlo.convolution") for low in (fast, plain)]
# Input gradients of the two shortcuts of stride 2 are fast as they are.
assert left[0] == 2 and left[1] > 20, left
(loss, grads), (expected, wanted) = (
    low.compile()(variables["params"]) for low in (fast, plain)
)
np.testing.assert_allclose(loss, expected, rtol=1e-5)
size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted))
for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(one, two, atol=1e-4 * size)
print("equal")
"""


def test_a_network_on_one_cpu():
    """A real process with one device: a whole network takes the fast forms."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STEP],
        capture_output=True,
        text=True,
        timeout=240,
        env={"JAX_PLATFORMS": "cpu", "PATH": "", "HOME": "/nonexistent"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"
