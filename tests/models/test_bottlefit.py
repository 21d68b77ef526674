"""Networks behind a bottleneck: taps, sizes, names shared with the teacher."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models


def paths(variables):
    flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def small(**options):
    fields = {"base": "resnet8", "num_classes": 3, "bottleneck_channels": 2}
    return models.create("bottlefit", width_factor=0.25, **fields | options)


def test_the_published_network(abstract):
    network = models.create("bottlefit", num_classes=1000, bottleneck_channels=3)
    _, outputs = abstract(network, (224, 224, 3))
    assert {name: tap.shape[1:] for name, tap in outputs.taps.items()} == {
        "bottleneck": (29, 29, 3),
        "stage2": (28, 28, 512),
        "stage3_pre": (14, 14, 1024),
        "stage3": (14, 14, 1024),
        "stage4_pre": (7, 7, 2048),
        "stage4": (7, 7, 2048),
        "pooled": (2048,),
    }
    assert list(outputs.taps)[:2] == ["bottleneck", "stage2"]
    assert list(outputs.norms) == ["stage3_pre", "stage4_pre"]
    assert outputs.logits.shape == (1, 1000) and outputs.head is not None


@pytest.mark.parametrize("channels, sent", [(3, 2_523), (12, 10_092)])
def test_the_published_bytes(channels, sent):
    network = models.create(
        "bottlefit", num_classes=1000, bottleneck_channels=channels, bits=8
    )
    facts = network.facts((224, 224, 3))
    assert facts == {"bytes_sent": sent + 8, "bytes_input": 224 * 224 * 3}


def test_the_size_of_a_code_that_is_not_quantised():
    numbers = 5 * 5 * 2
    assert small().facts((8, 8, 1)) == {"bytes_sent": 4 * numbers, "bytes_input": 64}
    assert small(bits=16).facts((8, 8, 1))["bytes_sent"] == 2 * numbers


@pytest.mark.parametrize(
    "base, image", [("resnet8", 8), ("resnet18", 32), ("resnet50", 32), ("plain20", 8)]
)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_the_tail_has_the_names_of_the_base_and_stage2_its_shape(
    base, image, version, abstract
):
    options = {"num_classes": 3, "width_factor": 1 / 16}
    shape = (image, image, 3)
    plain, expected = abstract(models.create(base, **options), shape)
    network = models.create("bottlefit", base=base, version=version, **options)
    variables, outputs = abstract(network, shape)
    of_base, own = paths(plain), paths(variables)
    new = {path for path in own if path not in of_base}
    assert {"/".join(path.split("/")[:3]) for path in new} == {
        "trunk/bottleneck/encoder",
        "trunk/bottleneck/decoder",
    }
    assert all(own[path] == of_base[path] for path in own.keys() - new)
    left = of_base.keys() - own.keys()
    assert left and all(
        path.split("/")[1].startswith(("stem", "stage1", "stage2")) for path in left
    )
    if image == 8 or version < 3:  # version 3 needs a multiple of 16
        for tap in outputs.taps.keys() - {"bottleneck"}:
            assert outputs.taps[tap].shape == expected.taps[tap].shape


def test_a_perfect_decoder_would_give_the_teachers_logits(randomised, quick_jit):
    # The tail with the teacher's parameters, on the teacher's stage 2.
    options = {"num_classes": 3, "width_factor": 0.25}
    teacher = models.create("resnet8", **options)
    v = randomised(teacher, (8, 8, 3))
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 3)), "float32")
    expected = quick_jit(teacher.apply)(v, images)

    trunk = small().trunk.clone(bottleneck=_Fixed(expected.taps["stage2"]))
    tail = models.ResNet(num_classes=3, trunk=trunk)
    outputs = quick_jit(tail.apply)(v, images)
    np.testing.assert_allclose(outputs.logits, expected.logits, rtol=1e-5, atol=1e-6)


class _Fixed:
    """In the place of a bottleneck: a map that is given."""

    def __init__(self, maps):
        self.maps = maps

    def __call__(self, images, train):
        return images, self.maps


def test_everything_learns_and_quantisation_is_for_evaluation(randomised, quick_jit):
    network = small(bits=8)
    v = randomised(network, (8, 8, 1))
    images = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 1)), "float32")

    def loss(params, network):
        outputs, new = network.apply(
            {**v, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(jnp.square(outputs.logits)), new

    step = quick_jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (value, _), gradient = step(v["params"], network)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, path
    assert value == step(v["params"], small())[0][0]
    sent, exact = (
        quick_jit(n.apply)(v, images).logits for n in (network, small(bits=None))
    )
    assert 0 < np.abs(sent - exact).max() < 0.1 * np.abs(exact).max()


def test_the_segmentation_network(abstract):
    options = {"num_classes": 2, "width_factor": 0.25}
    network = models.create("bottlefit_seg", bottleneck_channels=3, bits=8, **options)
    variables, outputs = abstract(network, (64, 96, 1))
    plain, expected = abstract(models.create("resnet18_seg", **options), (64, 96, 1))
    assert list(outputs.taps) == "bottleneck e3 e4 e5 d5 d4 out".split()
    assert outputs.taps["bottleneck"].shape == (1, 9, 13, 3)
    for tap in outputs.taps.keys() - {"bottleneck"}:
        assert outputs.taps[tap].shape == expected.taps[tap].shape
    assert outputs.logits.shape == (1, 64, 96, 2)
    shared = {p: s for p, s in paths(variables).items() if "bottleneck" not in p}
    assert shared.items() <= paths(plain).items() and len(shared) > 20
    assert network.facts((64, 96, 1)) == {
        "bytes_sent": 9 * 13 * 3 + 8,
        "bytes_input": 64 * 96,
    }


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"base": "wrn_16_2"}, ValueError, "base must be a residual network such as"),
        ({"base": "bottlefit"}, ValueError, "such as 'resnet50', got 'bottlefit'"),
        ({"base": "resnet21"}, KeyError, "no network 'resnet21'"),
        ({"base": "resnet20", "stem": "cifar"}, TypeError, "has no option 'stem'"),
        ({"bottleneck_channels": 0}, ValueError, "bottleneck_channels must be >= 1"),
        ({"bits": 4}, TypeError, "option 'bits' must be"),
        ({"version": 4}, TypeError, "option 'version' must be one of 1, 2, 3"),
    ],
)
def test_mistakes_name_the_option(options, error, message):
    with pytest.raises(error, match=message):
        models.create("bottlefit", num_classes=3, **options)
