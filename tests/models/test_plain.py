"""Networks without some or all of their shortcuts."""

import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models

PLAIN = ["plain20", "plain32", "plain44", "plain56", "plain110"]
PLAIN_IMAGENET = ["plain18", "plain34", "plain50"]
TAPS = ("stem", "stage1", "stage2", "stage3", "pooled")


def shapes(network, abstract, image_shape=(8, 8, 3)):
    variables, _ = abstract(network, image_shape)
    flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def shortcuts(parameters):
    """The blocks whose shortcut has a 1x1 convolution."""
    return sorted(
        path.split("/")[1]
        for path in parameters
        if path.endswith("shortcut/conv/kernel")
    )


@pytest.mark.parametrize("name", PLAIN + PLAIN_IMAGENET)
def test_plain_networks_have_all_parameters_but_the_projections(name, abstract):
    residual = name.replace("plain", "resnet")
    full = shapes(models.create(residual, num_classes=100), abstract)
    plain = shapes(models.create(name, num_classes=100), abstract)
    kept = {path: shape for path, shape in full.items() if "shortcut" not in path}
    assert plain == kept
    stages = 3 if name in PLAIN else 4
    projections = stages - 1 if name != "plain50" else 4
    assert len(shortcuts(full)) == projections
    removed = sum(math.prod(x) for x in full.values()) - sum(
        math.prod(x) for x in plain.values()
    )
    # A 1x1 kernel and a batch norm from each width to the next.
    widths = (16, 16, 32, 64) if name in PLAIN else (64, 64, 128, 256, 512)
    if name == "plain50":
        widths = (64, 256, 512, 1024, 2048)
    changes = [(a, b) for a, b in zip(widths, widths[1:], strict=False) if a != b]
    assert removed == sum(a * b + 2 * b for a, b in changes)


def test_the_published_size_without_projections(count):
    # 278,324 less (16 * 32 + 64) and (32 * 64 + 128).
    assert count(models.create("plain20", num_classes=100), (32, 32, 3)) == 275_572


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50"])
@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, None),
        ({"skip": "downsample_only"}, None),
        ({"skip": "none"}, 0),
        ({"skip": "first_k", "skip_blocks": 0}, 0),
    ],
)
def test_projections_that_remain(name, options, kept, abstract):
    network = models.create(name, num_classes=3, width_factor=1 / 16, **options)
    full = shapes(models.create(name, num_classes=3, width_factor=1 / 16), abstract)
    expected = shortcuts(full) if kept is None else []
    assert shortcuts(shapes(network, abstract)) == expected


def test_first_k_counts_blocks_across_stages(abstract):
    for k, expected in {
        2: [],
        3: ["stage2_block1"],
        6: ["stage2_block1", "stage3_block1"],
    }.items():
        network = models.create(
            "resnet14", num_classes=3, skip="first_k", skip_blocks=k
        )
        assert shortcuts(shapes(network, abstract)) == expected


def test_skips_change_no_initial_draw(quick_jit):
    images = jnp.zeros((1, 8, 8, 3))

    def draw(skip):
        network = models.create("resnet8", num_classes=3, width_factor=1 / 8, skip=skip)
        variables = quick_jit(network.init)(jax.random.key(3), images)
        return flax.traverse_util.flatten_dict(variables["params"], sep="/")

    residual, plain = draw("all"), draw("none")
    assert plain.keys() < residual.keys()
    for path, leaf in plain.items():
        np.testing.assert_array_equal(leaf, residual[path])


@pytest.mark.parametrize(
    "skip, k, with_skip",
    [
        ("none", None, ()),
        ("downsample_only", None, (3, 5)),
        ("first_k", 4, (1, 2, 3, 4)),
        ("all", None, (1, 2, 3, 4, 5, 6)),
    ],
)
def test_forward_equals_numpy(skip, k, with_skip, slow, randomised, quick_jit):
    network = models.create(
        "resnet14", num_classes=5, width_factor=0.25, skip=skip, skip_blocks=k
    )
    v = randomised(network, (7, 8, 3))
    image = np.random.default_rng(1).normal(size=(2, 7, 8, 3)).astype(np.float32)
    x = slow.relu(slow.norm(v, "trunk/stem_norm", slow.conv(v, "trunk/stem", image)))
    expected = [x]
    for block in range(1, 7):
        stage, i = (block + 1) // 2, (block + 1) % 2 + 1
        path = f"trunk/stage{stage}_block{i}"
        stride = 2 if stage > 1 and i == 1 else 1
        if block in with_skip:
            x = slow.basic_block(v, path, x, stride)
        else:
            y = slow.conv(v, f"{path}/conv1", x, stride)
            y = slow.relu(slow.norm(v, f"{path}/norm1", y))
            y = slow.norm(v, f"{path}/norm2", slow.conv(v, f"{path}/conv2", y))
            x = slow.relu(y)
        if i == 2:
            expected.append(x)
    expected.append(x.mean((1, 2)))
    outputs = quick_jit(network.apply)(v, jnp.array(image))
    for name, value in zip(TAPS, expected, strict=True):
        np.testing.assert_allclose(outputs.taps[name], value, rtol=2e-4, atol=2e-4)


def test_a_plain_network_has_the_taps_of_its_residual_twin(abstract):
    for name in ("20", "50"):
        pair = [
            abstract(models.create(kind + name, num_classes=3), (32, 32, 3))[1]
            for kind in ("plain", "resnet")
        ]
        assert jax.tree.map(jnp.shape, pair[0]) == jax.tree.map(jnp.shape, pair[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"skip_blocks": 3}, "skip_blocks needs skip=\"first_k\", got skip='all'"),
        ({"skip": "first_k"}, "needs skip_blocks from 0 to 9, got None"),
        ({"skip": "first_k", "skip_blocks": 10}, "from 0 to 9, got 10"),
        ({"skip": "first_k", "skip_blocks": -1}, "from 0 to 9, got -1"),
    ],
)
def test_wrong_numbers_of_blocks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.create("resnet20", num_classes=3, **options)


def test_plain_networks_take_no_option_skip():
    with pytest.raises(TypeError, match="has no option 'skip'"):
        models.create("plain20", num_classes=3, skip="all")
