"""Vision transformers: published sizes and costs, taps, tokens, a slow forward pass."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models
from jaxkd.analysis import network_costs
from jaxkd.layers import NetworkSpec
from jaxkd.models.vit import VisionTransformer

# Width, published parameters without and with a distillation token, published GMACs.
PUBLISHED = {
    "tiny": (192, 5_717_416, 5_910_800, 1.26),
    "small": (384, 22_050_664, 22_436_432, 4.6),
    "base": (768, 86_567_656, 87_338_192, 17.6),
}
SHAPE = (16, 24, 3)
tiny = functools.partial(
    VisionTransformer, num_classes=3, width=12, heads=3, depth=4, patch_size=8
)


def images(batch=2):
    rng = np.random.default_rng(0)
    return jnp.array(rng.normal(size=(batch, *SHAPE)), jnp.float32)


def parameters(width, patches, prefix, classes=1000, depth=12, patch_size=16):
    """In closed form; every token of the prefix has a classifier."""
    block = 12 * width**2 + 13 * width  # four layers with biases and two norms
    embedding = (3 * patch_size**2 + 1) * width
    tokens = (prefix + patches + prefix) * width
    heads = prefix * (width + 1) * classes
    return embedding + tokens + depth * block + 2 * width + heads


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_number_of_parameters(size, count):
    width, plain, distilled, _ = PUBLISHED[size]
    network = models.create(f"deit_{size}", num_classes=1000)
    assert count(network, (224, 224, 3)) == parameters(width, 196, 1) == plain
    network = models.create(f"deit_{size}_distilled", num_classes=1000)
    assert count(network, (224, 224, 3)) == parameters(width, 196, 2) == distilled


def test_costs_by_hand():
    for size, (width, _, _, published) in PUBLISHED.items():
        tokens = 197
        block = 12 * tokens * width**2 + 2 * tokens**2 * width
        macs = 196 * 3 * 16**2 * width + 12 * block + width * 1000
        assert macs == pytest.approx(1e9 * published, rel=0.01)
        if size != "base":  # the same code at another width
            network = models.create(f"deit_{size}", num_classes=1000)
            assert network_costs(network, (224, 224, 3)).macs == macs


@pytest.mark.parametrize("distilled, tokens", [(False, 197), (True, 198)])
def test_taps_at_224_pixels(distilled, tokens, abstract):
    name = "deit_small_distilled" if distilled else "deit_small"
    variables, outputs = abstract(models.create(name, num_classes=7), (224, 224, 3))
    assert variables.keys() == {"params"}
    expected = {"stem": (tokens, 384)}
    for block in range(1, 13):
        expected[f"block{block}"] = (tokens, 384)
        if block % 3 == 0:
            expected[f"stage{block // 3}"] = (tokens, 384)
    expected |= {"tokens": (tokens, 384), "pooled": (384,)}
    if distilled:
        expected |= {"cls_logits": (7,), "dist_logits": (7,)}
    spec = NetworkSpec.from_outputs(name, outputs)
    assert list(spec.taps.items()) == list(expected.items())
    assert spec.stages == ("stage1", "stage2", "stage3", "stage4")
    assert spec.has_head != distilled and spec.num_classes == 7


@pytest.mark.parametrize("size, heads", models.vit.HEADS.items())
def test_blocks_are_split_by_heads_and_hidden_units(size, heads, abstract):
    network = models.create(f"deit_{size}_distilled", num_classes=7, width_factor=0.25)
    partition = network.partition()
    assert partition.units == {"heads": heads}
    variables, _ = abstract(network, (32, 32, 3))
    split = {}
    for path, leaf in jax.tree.leaves_with_path(variables["params"]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = partition.spec(name)
        if spec:
            assert len(spec) == leaf.ndim
            # Whole heads of 16 channels, and whole hidden units.
            assert leaf.shape[spec.index("model")] % (heads * 16) == 0
            split[name] = spec
    block = {
        "attention/qkv/kernel": (None, "model"),
        "attention/qkv/bias": ("model",),
        "attention/project/kernel": ("model", None),
        "hidden/kernel": (None, "model"),
        "hidden/bias": ("model",),
        "output/kernel": ("model", None),
    }
    assert split == {
        f"block{i}/{name}": spec for i in range(1, 13) for name, spec in block.items()
    }


def test_small_images_with_small_patches(abstract):
    options = {"num_classes": 10, "patch_size": 4, "width_factor": 1 / 16, "depth": 8}
    _, outputs = abstract(models.create("deit_tiny", **options), (32, 32, 1))
    assert outputs.taps["stage4"].shape == (1, 65, 12)
    assert "block8" in outputs.taps and "block9" not in outputs.taps


def slow_norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def slow_linear(p, x):
    return x @ p["kernel"] + p["bias"]


def slow_attention(p, x, heads):
    """One example, one head at a time."""
    width = x.shape[-1] // heads
    out = []
    for head in np.split(slow_linear(p["qkv"], x), heads, axis=-1):
        query, key, value = np.split(head, 3, axis=-1)
        scores = query @ key.T / math.sqrt(width)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out.append(weights @ value)
    return slow_linear(p["project"], np.concatenate(out, axis=-1))


def slow_gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def slow_stem(p, image, prefix, patch_size=8):
    """Patches of one image, row by row, each as one vector."""
    n = patch_size
    kernel = p["patches"]["kernel"].reshape(-1, 12)
    patches = [
        image[i : i + n, j : j + n].ravel() @ kernel + p["patches"]["bias"]
        for i in range(0, image.shape[0], n)
        for j in range(0, image.shape[1], n)
    ]
    return np.stack([*(p[name][0, 0] for name in prefix), *patches]) + p["positions"][0]


@pytest.mark.parametrize("distilled", [False, True])
def test_forward_equals_numpy(distilled, randomised, quick_jit):
    network = tiny(distilled=distilled)
    v, x = randomised(network, SHAPE), images()
    outputs = quick_jit(network.apply)(v, x)
    p = jax.tree.map(lambda leaf: np.array(leaf, np.float64), v["params"])
    prefix = ["cls_token", "dist_token"] if distilled else ["cls_token"]
    for example in range(2):
        y = slow_stem(p, np.array(x[example], np.float64), prefix)
        expected = {"stem": y}
        for i in range(1, 5):
            block = p[f"block{i}"]
            y = y + slow_attention(block["attention"], slow_norm(block["norm1"], y), 3)
            hidden = slow_linear(block["hidden"], slow_norm(block["norm2"], y))
            y = y + slow_linear(block["output"], slow_gelu(hidden))
            expected[f"block{i}"] = expected[f"stage{i}"] = y
        tokens = slow_norm(p["norm"], y)
        expected |= {"tokens": tokens, "pooled": tokens[0]}
        logits = slow_linear(p["head"], tokens[0])
        if distilled:
            second = slow_linear(p["head_dist"], tokens[1])
            expected |= {"cls_logits": logits, "dist_logits": second}
            logits = (logits + second) / 2
        assert list(outputs.taps) == list(expected)
        for tap, value in expected.items():
            np.testing.assert_allclose(
                outputs.taps[tap][example], value, rtol=2e-4, atol=2e-4
            )
        np.testing.assert_allclose(
            outputs.logits[example], logits, rtol=2e-4, atol=2e-4
        )


def test_the_head_gives_the_logits_unless_there_are_two(randomised, quick_jit):
    v = randomised(tiny(), SHAPE)
    outputs = quick_jit(tiny().apply)(v, images())
    logits = outputs.taps["pooled"] @ outputs.head["kernel"]
    logits += outputs.head["bias"][None]
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-5, atol=1e-6)
    assert outputs.head["kernel"].shape == (12, 3)


def gradient(network, v, x):
    def loss(params):
        outputs = network.apply({"params": params}, x, train=True)
        return jnp.mean(jnp.square(outputs.logits))

    return jax.grad(loss)(v["params"])


def test_remat_changes_no_number_and_everything_learns(randomised, quick_jit):
    plain, remat = tiny(distilled=True), tiny(distilled=True, remat=True)
    v, x = randomised(plain, SHAPE), images()
    # The tangents of norms and attention weights are recomputed in any case.
    count, least = (
        str(jax.make_jaxpr(functools.partial(gradient, n))(v, x)).count("remat")
        for n in (remat, plain)
    )
    assert count > least
    one = quick_jit(functools.partial(gradient, plain))(v, x)
    two = quick_jit(functools.partial(gradient, remat))(v, x)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(one), jax.tree.leaves(two), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
        assert np.abs(a).max() > 0, path


def test_bfloat16_computes_narrow_and_stays_close(randomised, quick_jit):
    v, x = randomised(tiny(), SHAPE), images()
    half = quick_jit(tiny(dtype=jnp.bfloat16).apply)(v, x)
    exact = quick_jit(tiny().apply)(v, x)
    wide = {name for name, tap in half.taps.items() if tap.dtype == jnp.float32}
    assert wide == {"pooled"} and half.logits.dtype == jnp.float32
    scale = float(jnp.abs(exact.logits).max())
    np.testing.assert_allclose(half.logits, exact.logits, atol=0.05 * scale)


@pytest.mark.parametrize("remat", [False, True])
def test_drop_path_leaves_out_whole_branches_of_examples(remat, randomised, quick_jit):
    network = tiny(drop_path=0.9, remat=remat)
    v, x = randomised(network, SHAPE), images(batch=16)

    def train(key):
        return network.apply(v, x, train=True, rngs={"dropout": key})

    one, two = map(quick_jit(train), jax.random.split(jax.random.key(0)))
    assert not np.array_equal(one.taps["block4"], two.taps["block4"])
    # The rate rises linearly from 0: the first block drops nothing.
    np.testing.assert_array_equal(one.taps["block1"], two.taps["block1"])
    # Both branches of the last block are left out for a share 0.81 of the examples.
    same = (one.taps["block4"] == one.taps["block3"]).reshape(16, -1)
    assert 8 <= same.all(-1).sum() < 16
    evaluated = quick_jit(network.apply)(v, x).logits
    np.testing.assert_array_equal(evaluated, quick_jit(tiny().apply)(v, x).logits)


def test_tokens_start_small_and_linear_layers_without_bias(quick_jit):
    network = tiny(width=96, distilled=True)
    v = quick_jit(lambda x: network.init(jax.random.key(0), x))(images())["params"]
    for value in (v["positions"], v["block1"]["hidden"]["kernel"], v["head"]["kernel"]):
        np.testing.assert_allclose(np.std(value), 0.02, rtol=0.1)
    assert not np.array_equal(v["cls_token"], v["dist_token"])
    np.testing.assert_array_equal(v["block2"]["attention"]["qkv"]["bias"], 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"depth": 6}, "depth must be a multiple of 4 above 0, got 6"),
        ({"patch_size": 0}, "patch_size must be >= 1, got 0"),
        ({"drop_path": -0.1}, "drop_path must be >= 0 and < 1, got -0.1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.create("deit_tiny", num_classes=2, **options)


def test_images_of_another_size_are_refused(abstract):
    with pytest.raises(ValueError, match="vit needs a height and width divisible by 8"):
        abstract(tiny(), (16, 20, 3))
    variables, _ = abstract(tiny(), (16, 16, 3))
    with pytest.raises(ValueError, match="initialised for 4 patches, got 6 from im"):
        jax.eval_shape(tiny().apply, variables, images())
