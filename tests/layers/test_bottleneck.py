"""The bottleneck of split computing against its tables in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.layers import BottleneckCodec
from jaxkd.numerics import affine_dequantize, affine_quantize

STEM, STAGE, CODE = 3, 4, 2
# (kind, output channels, kernel, stride, padding); "norm" is batch norm and ReLU.
LARGE = [("conv", STEM, 7, 2, 3), "norm", "max", "norm"]
TAIL = ["norm", ("conv", STAGE, 2, 1, 0), "norm", ("conv", STAGE, 2, 1, 0), "mean"]
UP = ("conv", STAGE, 2, 1, 1)
CUT = ("conv", CODE, 2, 2, 1)
TABLES = {
    (1, False): (
        [("conv", CODE, 7, 2, 3), "norm", "max"],
        ["norm", ("conv", STEM, 2, 2, 1), "norm", UP, "norm", UP, *TAIL],
    ),
    (2, False): ([*LARGE, CUT], ["norm", UP, "norm", UP, *TAIL]),
    (3, False): (
        [*LARGE, ("conv", STAGE, 2, 2, 1), "norm", CUT],
        ["norm", ("up", STAGE), "norm", UP, *TAIL],
    ),
    (1, True): (
        [("conv", CODE, 3, 1, 1), "norm"],
        ["norm", ("conv", STEM, 2, 2, 1), "norm", UP, "norm", UP, *TAIL],
    ),
    (2, True): (
        [("conv", STEM, 3, 1, 1), "norm", CUT],
        ["norm", UP, "norm", UP, *TAIL],
    ),
    (3, True): (
        [("conv", STEM, 3, 1, 1), "norm", ("conv", STAGE, 2, 2, 1), "norm", CUT],
        ["norm", ("up", STAGE), "norm", UP, *TAIL],
    ),
}


def quick(module):
    """`module.apply(v, images, train)` for programs that run once."""
    return jax.jit(
        lambda v, x, train: module.apply(
            v, x, train, mutable=["batch_stats"] if train else False
        ),
        static_argnums=2,
        compiler_options={"xla_backend_optimization_level": 0},
    )


def codec(version=2, small=False, **options):
    return BottleneckCodec(
        channels=CODE,
        stem_width=STEM,
        stage_width=STAGE,
        version=version,
        small=small,
        **options,
    )


def randomised(module, shape, seed=0):
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(
        lambda key, x: module.init(key, x, False), jax.random.key(0), images
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map_with_path(
        lambda path, x: jnp.asarray(
            rng.uniform(0.5, 1.5, x.shape)
            if path[-1].key in ("scale", "var")
            else rng.normal(0, 0.4, x.shape),
            jnp.float32,
        ),
        variables,
    )


def windows(x, k, stride, padding, fill=0.0):
    """All windows, `[b, rows, columns, k, k, c]`."""
    edge = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    x = np.pad(x, edge, constant_values=fill)
    found = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(1, 2))
    return found[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)


def run(layers, params, stats, x):
    convs = norms = 0
    for layer in layers:
        if layer == "norm":
            norms += 1
            p, s = params[f"norm{norms}"], stats[f"norm{norms}"]
            x = (x - np.array(s["mean"])) / np.sqrt(np.array(s["var"]) + 1e-5)
            x = np.maximum(x * np.array(p["scale"]) + np.array(p["bias"]), 0)
        elif layer == "max":
            x = windows(x, 3, 2, 1, -np.inf).max((3, 4))
        elif layer == "mean":
            x = windows(x, 2, 1, 0).mean((3, 4))
        else:
            convs += 1
            kernel = np.array(params[f"conv{convs}"]["kernel"])
            assert kernel.shape[-1] == layer[1]
            if layer[0] == "up":  # every pixel becomes a square of four
                big = np.einsum("bhwc,ijco->bhiwjo", x, kernel[::-1, ::-1])
                b, h, w = x.shape[:3]
                x = big.reshape(b, 2 * h, 2 * w, -1)
            else:
                assert kernel.shape[0] == layer[2]
                x = np.einsum("bhwijc,ijco->bhwo", windows(x, *layer[2:]), kernel)
    return x


@pytest.mark.parametrize("version, small", TABLES)
def test_forward_equals_numpy(version, small):
    shape = (2, 8, 12, 3) if small else (2, 16, 32, 3)
    module = codec(version, small)
    v = randomised(module, shape)
    image = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    expected, x = [], image
    for part, layers in zip(
        ("encoder", "decoder"), TABLES[version, small], strict=True
    ):
        x = run(layers, v["params"][part], v["batch_stats"][part], x)
        expected.append(x)
    code, maps = quick(module)(v, jnp.array(image), False)
    np.testing.assert_allclose(code, expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(maps, expected[1], rtol=1e-4, atol=1e-4)
    factor = 2 if small else 8
    assert maps.shape == (2, shape[1] // factor, shape[2] // factor, STAGE)


@pytest.mark.parametrize("version, side", [(1, 56), (2, 29), (3, 15)])
def test_published_sizes(version, side):
    module = codec(version)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    (code, maps), _ = jax.eval_shape(
        lambda key, x: module.init_with_output(key, x, False), jax.random.key(0), images
    )
    assert code.shape == (1, side, side, CODE) and maps.shape == (1, 28, 28, STAGE)
    numbers = side * side * CODE
    for bits, expected in ((None, 4 * numbers), (16, 2 * numbers), (8, numbers + 8)):
        assert codec(version, bits=bits).bytes_sent((224, 224)) == expected


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("small", [False, True])
def test_bytes_sent_are_those_of_the_code(version, small):
    for size in ((16, 48), (17, 30)):
        module = codec(version, small, bits=16)
        images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        (code, _), _ = jax.eval_shape(
            lambda key, x, module=module: module.init_with_output(key, x, False),
            jax.random.key(0),
            images,
        )
        assert module.bytes_sent(size) == 2 * code.size


def test_evaluation_decodes_what_was_sent_and_training_does_not():
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 3)), "float32")
    v = randomised(codec(small=True), images.shape)
    code, exact = quick(codec(small=True))(v, images, False)

    def decode(code):
        # The decoder alone, on a code that is given.
        p, s = v["params"]["decoder"], v["batch_stats"]["decoder"]
        return run(TABLES[2, True][1], p, s, np.array(code))

    received = {
        8: affine_dequantize(affine_quantize(code)),
        16: code.astype(jnp.float16).astype(jnp.float32),
    }
    for bits, sent in received.items():
        module = codec(small=True, bits=bits)
        kept, maps = quick(module)(v, images, False)
        np.testing.assert_array_equal(kept, code)
        np.testing.assert_allclose(maps, decode(sent), rtol=1e-4, atol=1e-5)
        assert jnp.abs(maps - exact).max() > 1e-5
        trained = [quick(m)(v, images, True)[0][1] for m in (module, codec(small=True))]
        np.testing.assert_array_equal(*trained)


def test_an_image_does_not_depend_on_the_batch_when_scaled_by_itself():
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 3)), "float32")
    images = images * jnp.array([1.0, 20.0]).reshape(2, 1, 1, 1)
    v = randomised(codec(small=True), images.shape)
    own = quick(codec(small=True, bits=8))
    np.testing.assert_allclose(
        own(v, images, False)[1][:1],
        own(v, images[:1], False)[1],
        atol=1e-5,
    )
    shared = quick(codec(small=True, bits=8, per_sample=False))
    both, alone = (shared(v, x, False)[1][0] for x in (images, images[:1]))
    assert jnp.abs(both - alone).max() > 1e-3


def test_bfloat16_and_remat_keep_the_parameters():
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)

    def traced(module):
        return jax.eval_shape(
            lambda key, x: module.init_with_output(key, x, False),
            jax.random.key(0),
            images,
        )

    outputs, variables = traced(codec(small=True, bits=8, dtype=jnp.bfloat16))
    assert {x.dtype for x in outputs} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    _, kept = traced(codec(small=True, remat=True))
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, variables)


def test_kernels_are_drawn_within_one_over_root_fan_in():
    module = BottleneckCodec(channels=64, stem_width=64, stage_width=64, version=3)
    options = {"compiler_options": {"xla_backend_optimization_level": 0}}
    init = jax.jit(lambda key, x: module.init(key, x, False), **options)
    v = init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    for part, name in (
        ("encoder", "conv2"),
        ("decoder", "conv1"),
        ("decoder", "conv2"),
    ):
        kernel = np.array(v["params"][part][name]["kernel"])
        assert 0.99 / 16 < np.abs(kernel).max() <= 1 / 16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channels": 0}, "bottleneck_channels must be >= 1, got 0"),
        ({"version": 4}, "version must be 1, 2 or 3, got 4"),
        ({"bits": 4}, "bits must be None, 8 or 16, got 4"),
    ],
)
def test_mistakes_are_refused(options, message):
    widths = {"channels": 2, "stem_width": 3, "stage_width": 4}
    with pytest.raises((ValueError, TypeError), match=message):
        BottleneckCodec(**{**widths, **options})
