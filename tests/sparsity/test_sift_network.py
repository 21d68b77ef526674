"""Whole networks of every family: cost, shapes, choice of layers."""

import jax
import jax.numpy as jnp
import pytest

from jaxkd import models
from jaxkd.sparsity.distributions import overall
from jaxkd.sparsity.masks import Scope
from jaxkd.sparsity.sift_network import Recipe, transform

NETWORKS = {
    "resnet8": (dict(width_factor=2.0), 8),
    "vgg8": (dict(width_factor=0.5), 16),
    "mobilenetv2_cifar": (dict(width_factor=2.0), 32),
    "deit_tiny": (dict(width_factor=0.5, patch_size=4, depth=4), 8),
}
FAMILIES = ("wide", "parallel", "factorized", "doped")
PRODUCTS = ("conv", "dense")


def made_of(name="resnet8", size=None, **recipe):
    options, own_size = NETWORKS[name]
    network = models.create(name, num_classes=10, **options)
    size = size or own_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return transform(network, images, recipe=Recipe(**recipe), train=False)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_as_many_as_in_the_dense_network(name, family):
    made = made_of(name, family=family, sparsity=0.75, shortcuts="replaced")
    dense = made.sift.dense
    assert made.structure.logits == dense.logits == (1, 10)
    if family == "wide":
        # The sparsity is searched until everything that counts fits, norms included.
        share = made.flops.total / made.dense_flops.total
        assert share == pytest.approx(1, abs=1e-3)
        return
    assert made.structure.taps == dense.taps
    now = made.structure.flops(made.densities, kinds=PRODUCTS).total
    before = dense.flops(kinds=PRODUCTS).total
    # Ranks are whole numbers, which narrow layers feel; and of n weights n - 1 sums.
    assert now / before == pytest.approx(1, abs=0.02)
    # Without masks it costs more, by the zeros (doped: by the dense term).
    larger = made.unmasked_flops.total / made.dense_flops.total
    assert larger > (1.5 if family == "doped" else 2.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_zeros_no_change(family):
    made = made_of(family=family, sparsity=0.0)
    assert made.structure == made.sift.dense and made.sift.family == "dense"
    assert made.flops == made.dense_flops


def test_masks_alone_leave_the_layers():
    made = made_of(family="dense", sparsity=0.6)
    assert made.structure == made.sift.dense
    assert made.flops.total < 0.5 * made.dense_flops.total


def test_stem_classifier_and_depthwise_layers_stay_dense():
    made = made_of("mobilenetv2_cifar", family="parallel", sparsity=0.5)
    assert "group1_block1/expand/conv/kernel" in made.sparse
    for path in made.structure.params.keys() - made.sparse.keys():
        if path.endswith("kernel"):
            assert any(n in path for n in ("stem", "head", "depthwise")), path
    assert made.sift.dense.call("stem/conv") == made.structure.call("stem/conv")


def test_depthwise_layers_by_choice():
    scope = Scope(sparse=("group3_block1/depthwise",))
    for family, factor in (("parallel", 2), ("wide", None), ("factorized", None)):
        made = made_of("mobilenetv2_cifar", family=family, sparsity=0.5, scope=scope)
        dense = made.sift.dense.call("group3_block1/depthwise/conv")
        assert dense.depthwise
        path = "group3_block1/depthwise/conv"
        if family == "parallel":
            assert made.structure.call(path).f_out == factor * dense.f_out
            assert made.structure.call(path).groups == dense.groups
        if family == "factorized":
            # 9 / (0.5 * 10) = 1.8, so two per channel.
            assert made.structure.call(f"{path}/U").f_out == 2 * dense.f_out
            assert made.structure.call(f"{path}/V").groups == dense.groups


def test_shortcuts():
    path = "trunk/stage2_block1/shortcut/conv"
    sizes = {}
    for shortcuts in (None, "sparse", "dense", "replaced"):
        made = made_of(family="parallel", sparsity=0.5, shortcuts=shortcuts)
        width = made.structure.call(path).f_out
        sizes[shortcuts] = width, f"{path}/kernel" in made.sparse
    assert sizes == {
        None: (64, True), "sparse": (64, True), "dense": (64, False),
        "replaced": (128, True),
    }  # fmt: skip
    # The published doped networks mask S alone; the released rule masks everything.
    doped = made_of(family="doped", sparsity=0.5)
    assert not any("shortcut" in p or "/U/" in p for p in doped.sparse)
    released = made_of(family="doped", sparsity=0.5, mask_low_rank=True)
    assert f"{path}/kernel" in released.sparse
    assert any("/U/" in p for p in released.sparse)
    assert released.flops.total < 0.9 * doped.flops.total
    # Wide networks widen shortcuts anyway.
    assert made_of(family="wide", sparsity=0.75).structure.call(path).f_out == 128


def test_the_requested_sparsity_is_kept_without_a_search():
    made = made_of(family="wide", sparsity=0.5, search=False)
    assert made.sparsity == 0.5 and set(made.densities.values()) == {0.5}
    searched = made_of(family="wide", sparsity=0.5)
    assert searched.sparsity != 0.5
    assert searched.structure == made.structure


def test_layers_share_the_zeros_as_the_distribution_has_it():
    made = made_of(family="factorized", sparsity=0.75, distribution="erk")
    assert len(set(made.densities.values())) > 2
    assert overall(made.sparse, made.densities) == pytest.approx(0.25)


def test_layers_of_ones_own_choice():
    scope = Scope(dense=("stage1",))
    made = made_of(family="parallel", sparsity=0.5, scope=scope)
    assert not any("stage1" in path for path in made.sparse)
    kept = made.structure.params["trunk/stage1_block1/conv1/kernel"]
    assert kept == made.sift.dense.params["trunk/stage1_block1/conv1/kernel"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sparsity=1.0), "sparsity must be >= 0 and < 1"),
        (dict(sparsity=0.6), "sparsity 0.6 is not iso-FLOP"),
        (dict(family="parallel", sparsity=0.6), "any_cost=True"),
        (dict(base_width=0), "base_width must be >= 1"),
        (dict(branch_relu=True), "branch_relu is an option of the family parallel"),
        (dict(mask_low_rank=True), "mask_low_rank is an option of the family doped"),
        (dict(family="doped", base_width=8), "base_width is an option of the family w"),
        (dict(ranks={"a": 2}), "ranks is an option of the family factorized or doped"),
        (dict(family="doped", ranks={"a": 0}), "ranks: 'a' must be >= 1"),
    ],
)
def test_impossible_recipes(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_sparsities_that_cost_something_else_are_taken_on_demand():
    made = made_of(family="parallel", sparsity=0.6, any_cost=True)
    assert made.sift.branches == 2
    assert made.flops.total < 0.9 * made.dense_flops.total
    # Ranks are whole numbers at any sparsity.
    Recipe(family="doped", sparsity=0.6)
