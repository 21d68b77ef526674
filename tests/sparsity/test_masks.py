"""Masks against NumPy, exact counts, and which kernels get one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models
from jaxkd.sparsity import masks
from jaxkd.sparsity.masks import Scope


def numpy_topk(scores, count):
    """The slow way: a stable sort of the negative scores."""
    flat = np.asarray(scores).reshape(-1)
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:count]] = True
    return mask.reshape(np.shape(scores))


@pytest.mark.parametrize("count", [0, 1, 7, 23, 24])
def test_topk_is_a_stable_sort_also_with_ties(count):
    scores = np.random.default_rng(0).integers(0, 4, (2, 3, 4)).astype(np.float32)
    mask = masks.topk_mask(jnp.asarray(scores), count)
    np.testing.assert_array_equal(mask, numpy_topk(scores, count))
    traced = jax.jit(masks.topk_mask)(jnp.asarray(scores), jnp.int32(count))
    np.testing.assert_array_equal(traced, mask)


def test_topk_of_equal_scores_takes_the_first():
    mask = masks.topk_mask(jnp.zeros((2, 2)), 3)
    np.testing.assert_array_equal(mask, [[True, True], [True, False]])


def test_topk_handles_infinite_scores():
    scores = jnp.array([jnp.inf, -jnp.inf, 1.0, jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(masks.topk_mask(scores, 4), [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(masks.topk_mask(scores, 1), [1, 0, 0, 0, 0])


def test_topk_of_several_arrays_compares_them_with_each_other():
    rng = np.random.default_rng(1)
    scores = {"a": rng.normal(size=(3, 4)), "b": 2 * rng.normal(size=(5,))}
    found = masks.topk_masks({k: jnp.asarray(v) for k, v in scores.items()}, 6)
    joined = numpy_topk(np.concatenate([x.reshape(-1) for x in scores.values()]), 6)
    np.testing.assert_array_equal(found["a"], joined[:12].reshape(3, 4))
    np.testing.assert_array_equal(found["b"], joined[12:])


@pytest.mark.parametrize(
    ("size", "sparsity", "kept"),
    [(100, 0.0, 100), (100, 0.9, 10), (216, 0.3, 152), (216, 0.999, 1), (10, 1.0, 0)],
)
def test_counts_truncate_what_is_cut(size, sparsity, kept):
    assert masks.kept_count(size, sparsity) == kept
    weights = jax.random.normal(jax.random.key(0), (size,))
    mask = np.asarray(masks.magnitude_mask(weights, sparsity))
    assert mask.sum() == kept
    absolute = np.abs(np.asarray(weights))
    if 0 < kept < size:
        assert absolute[mask].min() >= absolute[~mask].max()


def test_random_masks_have_the_exact_count_and_differ_by_key():
    one = masks.random_mask(jax.random.key(0), (3, 3, 8, 8), 100)
    two = masks.random_mask(jax.random.key(1), (3, 3, 8, 8), 100)
    assert one.sum() == two.sum() == 100
    assert (one != two).any()
    # Every place is as likely as any other.
    keys = jax.random.split(jax.random.key(2), 400)
    often = jax.vmap(lambda key: masks.random_mask(key, (20,), 5))(keys).mean(axis=0)
    np.testing.assert_allclose(often, 0.25, atol=0.08)  # 3.7 standard deviations


def test_bernoulli_masks_are_the_draws_below_the_density():
    key = jax.random.key(3)
    mask = masks.bernoulli_mask(key, (50, 40), 0.75)
    np.testing.assert_array_equal(mask, jax.random.uniform(key, (50, 40)) < 0.25)
    assert abs(float(mask.mean()) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 2000)


@pytest.mark.parametrize("kind", ["magnitude", "random", "bernoulli"])
def test_every_output_channel_can_keep_a_weight(kind):
    weights = jax.random.normal(jax.random.key(0), (3, 3, 4, 16)) * jnp.where(
        jnp.arange(16) < 8, 1.0, 1e-3
    ).reshape(1, 1, 1, 16)
    key = jax.random.key(4)
    make = {
        "magnitude": lambda o: masks.magnitude_mask(weights, 0.95, outputs=o),
        "random": lambda o: masks.random_mask(key, weights.shape, 29, outputs=o),
        "bernoulli": lambda o: masks.bernoulli_mask(
            key, weights.shape, 0.95, outputs=o
        ),
    }[kind]
    plain, kept = np.asarray(make("any")), np.asarray(make("one"))
    assert not plain.any(axis=(0, 1, 2)).all()
    assert kept.any(axis=(0, 1, 2)).all()
    if kind == "bernoulli":
        empty = ~plain.any(axis=(0, 1, 2))
        assert kept.sum() == plain.sum() + empty.sum()
        np.testing.assert_array_equal(kept[..., ~empty], plain[..., ~empty])
    else:
        assert kept.sum() == plain.sum() == 29
    if kind == "magnitude":
        absolute = np.abs(np.asarray(weights)).reshape(-1, 16)
        largest = absolute.argmax(axis=0)
        assert kept.reshape(-1, 16)[largest, np.arange(16)].all()


def numpy_exchange(mask, weights, growth, drop, target):
    """One tensor, with lists, as the card has it."""
    active = [i for i in range(mask.size) if mask.flat[i]]
    by_size = sorted(active, key=lambda i: (-abs(weights.flat[i]), i))
    stay = set(by_size[: len(active) - drop])
    others = [i for i in range(mask.size) if i not in stay]
    grow = max(target - len(stay), 0)
    chosen = stay | set(sorted(others, key=lambda i: (-growth.flat[i], i))[:grow])
    return np.array([i in chosen for i in range(mask.size)]).reshape(mask.shape)


@pytest.mark.parametrize(
    ("drop", "target"), [(0, 30), (9, 30), (9, 40), (9, 10), (30, 30), (12, 60)]
)
def test_exchange_equals_the_slow_way(drop, target):
    rng = np.random.default_rng(drop + target)
    mask = numpy_topk(rng.random((3, 4, 5)), 30)
    weights = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    growth = rng.random(mask.shape).astype(np.float32)
    growth[0] = 0.0  # ties
    new = jax.jit(masks.exchange)(mask, weights, growth, drop=drop, target=target)
    np.testing.assert_array_equal(
        new, numpy_exchange(mask, weights, growth, drop, target)
    )
    assert new.sum() == max(target, 30 - drop)


def test_exchange_may_take_back_what_it_dropped():
    mask = jnp.array([True, True, False, False])
    weights = jnp.array([1.0, 0.1, 0.0, 0.0])
    growth = jnp.array([0.0, 9.0, 1.0, 2.0])
    new = masks.exchange(mask, weights, growth, drop=1, target=2)
    np.testing.assert_array_equal(new, mask)


def test_exchange_keeps_active_weights_before_inactive_ones():
    # An active weight may be exactly 0, as those are that were grown just now.
    mask = jnp.array([False, True, True, False])
    weights = jnp.array([0.0, 0.0, 1.0, 0.0])
    new = masks.exchange(mask, weights, jnp.zeros(4), drop=0, target=2)
    np.testing.assert_array_equal(new, mask)


def test_exchange_adds_noise_before_it_compares():
    mask, weights = jnp.ones(3, bool), jnp.array([3.0, 2.0, 1.0])
    noise = jnp.array([0.0, -5.0, 0.0])
    new = masks.exchange(
        mask, weights, jnp.array([0.0, 0.0, 0.0]), drop=1, target=2, noise=noise
    )
    np.testing.assert_array_equal(new, [True, False, True])


def test_exchange_can_leave_every_output_channel_its_largest_weight():
    rng = np.random.default_rng(5)
    weights = rng.normal(size=(10, 6)).astype(np.float32)
    weights[:, 3] *= 1e-4
    mask, growth = np.ones((10, 6), bool), np.zeros((10, 6), np.float32)
    growth[:, 0] = 1.0
    arrays = [jnp.asarray(x) for x in (mask, weights, growth)]
    new = {
        outputs: np.asarray(
            masks.exchange(*arrays, drop=50, target=12, outputs=outputs)
        )
        for outputs in ("any", "one")
    }
    assert not new["any"][:, 3].any()
    assert new["one"][np.abs(weights[:, 3]).argmax(), 3]
    assert new["any"].sum() == new["one"].sum() == 12


# Which kernels are sparse.


def params_of(name, channels=3, size=32, **options):
    network = models.create(name, num_classes=10, **options)
    images = jnp.zeros((1, size, size, channels))
    variables = jax.eval_shape(
        lambda: network.init(jax.random.key(0), images, train=False)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(variables["params"])
    }


def test_a_residual_network_keeps_stem_and_classifier_dense():
    found = Scope().select(params_of("resnet8"))
    assert "trunk/stage2_block1/shortcut/conv/kernel" in found
    assert found["trunk/stage1_block1/conv1/kernel"] == (3, 3, 16, 16)
    assert len(found) == 8
    assert not [p for p in found if "stem" in p or "head" in p]
    assert list(found) == sorted(found)


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("unet", {"encoder1/unit1/conv/kernel", "head/kernel"}),
        ("unetpp", {"node00/unit1/conv/kernel", "head/kernel"}),
        ("vgg8", {"stem_conv1/conv/kernel", "head/kernel"}),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_first_convolution_is_found_by_its_shape(name, dense, channels):
    params = params_of(name, channels, width_factor=0.25)
    kernels = {path for path, x in params.items() if x.ndim > 1}
    assert kernels - set(Scope().select(params)) == dense


def test_bottlenecks_put_first_are_seen_too():
    found = Scope().select(params_of("bottlefit_seg", size=64))
    assert "trunk/bottleneck/encoder/conv1/kernel" not in found
    assert "trunk/bottleneck/encoder/conv2/kernel" in found


def test_depthwise_convolutions_are_dense_unless_named():
    params = params_of("mobilenetv2_cifar")
    found = Scope().select(params)
    assert not [path for path in found if "depthwise" in path]
    more = Scope(sparse=("depthwise",)).select(params)
    assert len(more) - len(found) == sum("depthwise/conv" in path for path in params)


def test_tokens_positions_and_patches_of_a_transformer_are_dense():
    found = Scope().select(params_of("deit_tiny_distilled", size=224))
    assert len(found) == 12 * 4
    assert {path.rpartition("/")[2] for path in found} == {"kernel"}
    assert all(path.startswith("block") for path in found)


def test_patterns_add_and_take_away():
    params = params_of("resnet8")
    found = Scope(dense=("shortcut", "stage3"), sparse=("^head", "stem")).select(params)
    assert {"head/kernel", "trunk/stem/kernel"} <= set(found)
    assert not [path for path in found if "shortcut" in path or "stage3" in path]
    # Dense wins.
    both = Scope(dense=("head",), sparse=("head",)).select(params)
    assert "head/kernel" not in both


class Shape:
    def __init__(self, *shape):
        self.shape = shape


def test_a_first_convolution_that_cannot_be_told_must_be_named():
    params = {
        "a/kernel": Shape(3, 3, 3, 8),
        "b/kernel": Shape(3, 3, 8, 3),
        "c/kernel": Shape(3, 3, 3, 8),
    }
    with pytest.raises(ValueError, match="a/kernel and c/kernel have 3 input channels"):
        Scope().select(params)
    assert set(Scope(dense=("a/",)).select(params)) == {"b/kernel", "c/kernel"}
    assert set(Scope(sparse=("a/",)).select(params)) == set(params)


def test_grey_images_and_depthwise_convolutions_without_a_stem():
    params = {
        "a/kernel": Shape(3, 3, 1, 8),
        "b/kernel": Shape(3, 3, 1, 8),
        "c/kernel": Shape(1, 1, 8, 16),
        "d/kernel": Shape(1, 1, 16, 16),
    }
    assert set(Scope().select(params)) == {"d/kernel"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dense=("stage9",)), "scope.dense: 'stage9' matches no kernel; they are"),
        (dict(sparse=("bias",)), "scope.sparse: 'bias' matches no kernel"),
        (dict(dense=(".*",)), "no kernel is left to be sparse"),
    ],
)
def test_scopes_that_do_not_fit_the_network(options, message):
    with pytest.raises(ValueError, match=message):
        Scope(**options).select(params_of("resnet8"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dense=("(",)), "is no regular expression"),
        (dict(rule="released"), "needs num_classes"),
        (dict(rule="released", num_classes=10, dense=("x",)), "takes no patterns"),
    ],
)
def test_impossible_scopes(options, message):
    with pytest.raises(ValueError, match=message):
        Scope(**options)


def test_the_released_rule_goes_by_names_and_shapes():
    shapes = {
        "conv_stem/kernel": (3, 3, 3, 64),
        "block/conv/kernel": (3, 3, 64, 64),
        "block/shortcut/kernel": (1, 1, 64, 128),
        "block/norm/scale": (64,),
        "block/uv/kernel": (3, 3, 3, 64),  # of rank 3: taken for the stem
        "block/wide/kernel": (3, 3, 64, 100),  # taken for the classifier
        "cls_token": (1, 1, 64),
        "fc/kernel": (512, 100),
        "mlp/kernel": (512, 64),
    }
    found = masks.released_rule(shapes, image_channels=3, num_classes=100)
    assert found == ["block/conv/kernel", "block/shortcut/kernel", "mlp/kernel"]
    params = {path: Shape(*shape) for path, shape in shapes.items()}
    assert list(Scope(rule="released", num_classes=100).select(params)) == sorted(found)
