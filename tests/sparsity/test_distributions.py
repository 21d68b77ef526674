"""Densities per layer: sums, formulas worked out by hand, dense layers."""

import math

import numpy as np
import pytest

from jaxkd.sparsity import distributions
from jaxkd.sparsity.distributions import densities

SHAPES = {
    "a/kernel": (3, 3, 16, 16),
    "b/kernel": (3, 3, 16, 64),
    "c/kernel": (1, 1, 64, 128),
    "head/kernel": (128, 10),
}


def sizes():
    return {path: math.prod(shape) for path, shape in SHAPES.items()}


def test_uniform_gives_every_layer_the_same():
    found = densities(SHAPES, 0.9)
    assert found == dict.fromkeys(SHAPES, 1.0 - 0.9)


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.95, 0.999])
def test_the_whole_has_the_sparsity_asked_for(distribution, sparsity):
    found = densities(SHAPES, sparsity, distribution=distribution)
    assert all(0 < density <= 1 for density in found.values())
    assert distributions.overall(SHAPES, found) == pytest.approx(
        1 - sparsity, rel=1e-12
    )


def test_densities_follow_the_formulas_where_no_layer_is_dense():
    er = densities(SHAPES, 0.97, distribution="er")
    erk = densities(SHAPES, 0.97, distribution="erk")
    raw_er = {"a/kernel": 32 / 256, "b/kernel": 80 / 1024, "c/kernel": 192 / 8192}
    raw_erk = {"a/kernel": 38 / 2304, "b/kernel": 86 / 9216, "c/kernel": 194 / 8192}
    for found, raw in ((er, raw_er), (erk, raw_erk)):
        assert max(found.values()) < 1
        for path in raw:
            ratio = found[path] / found["head/kernel"]
            assert ratio == pytest.approx(raw[path] / (138 / 1280), rel=1e-12)


def test_layers_that_would_exceed_one_are_dense_and_the_rest_is_solved_again():
    found = densities(SHAPES, 0.75, distribution="erk")
    assert found["head/kernel"] == 1.0
    size = sizes()
    rest = 0.25 * sum(size.values()) - size["head/kernel"]
    raw = {"a/kernel": 38 / 2304, "b/kernel": 86 / 9216, "c/kernel": 194 / 8192}
    factor = rest / sum(raw[path] * size[path] for path in raw)
    for path in raw:
        assert found[path] == pytest.approx(factor * raw[path], rel=1e-12)


def test_layers_that_tie_become_dense_together():
    shapes = {"a": (2, 2), "b": (2, 2), "c": (100, 100)}
    found = densities(shapes, 0.5, distribution="erk")
    assert found["a"] == found["b"] == 1.0
    assert found["c"] == pytest.approx((0.5 * 10008 - 8) / 10000)


def test_the_power_flattens_or_sharpens():
    flat = densities(SHAPES, 0.97, distribution="erk", power=0.0)
    np.testing.assert_allclose(list(flat.values()), 0.03, rtol=1e-12)
    one, two = (
        densities(SHAPES, 0.99, distribution="erk", power=power) for power in (0.5, 1.0)
    )
    assert two["head/kernel"] / two["a/kernel"] == pytest.approx(
        (one["head/kernel"] / one["a/kernel"]) ** 2
    )


@pytest.mark.parametrize("kind", ["uniform", "er", "erk"])
def test_plus_caps_the_sparsity_of_the_classifier_alone(kind):
    shapes = {**SHAPES, "head/kernel": (512, 1000)}
    plain = densities(shapes, 0.98, distribution=kind)
    capped = densities(shapes, 0.98, distribution=f"{kind}+")
    assert plain["head/kernel"] < 0.2
    assert capped["head/kernel"] == 0.2
    assert all(capped[p] == plain[p] for p in shapes if p != "head/kernel")
    # A classifier that is denser anyway stays so.
    assert densities(SHAPES, 0.5, distribution=f"{kind}+") == densities(
        SHAPES, 0.5, distribution=kind
    )


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk+"])
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5])
def test_impossible_sparsities(distribution, sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        densities(SHAPES, sparsity, distribution=distribution)
