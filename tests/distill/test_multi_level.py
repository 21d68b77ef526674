import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.layers import Outputs

TEMPERATURES = (4.0, 3.0, 5.0, 2.0, 6.0)


@pytest.fixture
def two_views(classification):
    """Seven examples, so that the median is one of them, in two views."""
    rng = np.random.default_rng(3)

    def network():
        weak, strong = jnp.asarray(rng.normal(0, 2, (2, 7, 5)), jnp.float32)
        return Outputs(
            logits=weak, taps={}, views={"strong": Outputs(logits=strong, taps={})}
        )

    return dataclasses.replace(
        classification,
        student=network(),
        teachers=(network(),),
        batch={"label": jnp.asarray(rng.integers(0, 5, 7), jnp.int32)},
    )


def pairs(run):
    strong = run.student.views["strong"].logits, run.teacher.views["strong"].logits
    return (run.student.logits, run.teacher.logits), strong


def over(loss, pair, temperatures=TEMPERATURES, **options):
    return sum(np.float64(loss(*pair, temperature=t, **options)) for t in temperatures)


def test_both_variants_share_the_cross_entropy_of_both_views(two_views):
    weak, strong = pairs(two_views)
    labels = two_views.batch["label"]
    expected = sum(losses.cross_entropy(x, labels) for x in (weak[0], strong[0]))
    for variant in ("code", "paper"):
        terms = two_views.terms(distill.create("mlld", variant=variant))
        np.testing.assert_allclose(terms["ce"], expected, rtol=1e-6)


def test_the_published_code_scales_by_fractions_and_mixes_views(two_views):
    weak, strong = pairs(two_views)
    terms = two_views.terms(distill.create("mlld"))
    # Of 7 examples 4 are at most the median, of 5 classes 3.
    kd = 4 / 7 * over(losses.kd, weak)
    kd += over(losses.kd, strong, (4.0, 3.0, 5.0)) + over(losses.kd, weak, (2.0, 6.0))
    np.testing.assert_allclose(terms["kd"], kd, rtol=1e-5)
    cc = 3 / 5 * over(losses.class_correlation, weak)
    np.testing.assert_allclose(terms["cc"], cc, rtol=1e-5)
    bc = 4 / 7 * over(losses.batch_correlation, weak)
    np.testing.assert_allclose(terms["bc"], bc, rtol=1e-5)


def test_the_paper_masks_examples_and_uses_both_views(two_views):
    weak, strong = pairs(two_views)
    terms = two_views.terms(distill.create("mlld", variant="paper"))
    examples = losses.low_confidence(weak[1])
    classes = losses.low_confidence_classes(weak[1])
    assert int(examples.sum()) == 4
    kd = over(losses.kd, weak) * np.asarray(examples) + over(losses.kd, strong)
    np.testing.assert_allclose(terms["kd"], kd, rtol=1e-5)
    cc = over(losses.class_correlation, weak, where=classes)
    cc += over(losses.class_correlation, strong)
    np.testing.assert_allclose(terms["cc"], cc, rtol=1e-5)
    bc = over(losses.batch_correlation, weak) * np.asarray(examples)
    bc += over(losses.batch_correlation, strong)
    np.testing.assert_allclose(terms["bc"], bc, rtol=1e-5)


def test_with_few_temperatures_the_strong_view_has_no_kd_of_its_own(two_views):
    weak, _ = pairs(two_views)
    terms = two_views.terms(distill.create("mlld", temperatures=(2.0,)))
    expected = (1 + 4 / 7) * losses.kd(*weak, temperature=2.0)
    np.testing.assert_allclose(terms["kd"], expected, rtol=1e-5)


def test_mlld_asks_for_a_strong_view_and_carries_its_weights():
    method = distill.create("mlld", ce_weight=0.2, kd_weight=0.8)
    assert method.views == ("strong",)
    assert method.weights == {"ce": 0.2, "kd": 0.8, "cc": 0.8, "bc": 0.8}


def test_impossible_options_and_networks_are_one_line(two_views, segmentation):
    method = distill.create("mlld")
    alone = dataclasses.replace(two_views.data, batch_size=1)
    with pytest.raises(ValueError, match="batch_size of at least 2, got 1"):
        dataclasses.replace(two_views, data=alone).init(method)
    with pytest.raises(ValueError, match=r"needs logits \[classes\]; network 'stud"):
        segmentation.init(method)
    with pytest.raises(ValueError, match="at least one number"):
        distill.create("mlld", temperatures=())
    with pytest.raises(ValueError, match="temperatures must be > 0, got -1"):
        distill.create("mlld", temperatures=(4.0, -1.0))


def test_only_the_instance_level_sees_standardised_logits(two_views):
    weak, strong = pairs(two_views)
    plain = two_views.terms(distill.create("mlld"))
    terms = two_views.terms(distill.create("mlld", standardize=True))
    weak, strong = (
        tuple(losses.standardize_logits(x) for x in pair) for pair in (weak, strong)
    )
    kd = 4 / 7 * over(losses.kd, weak)
    kd += over(losses.kd, strong, (4.0, 3.0, 5.0)) + over(losses.kd, weak, (2.0, 6.0))
    np.testing.assert_allclose(terms["kd"], kd, rtol=1e-5)
    for name in ("ce", "cc", "bc"):
        np.testing.assert_array_equal(terms[name], plain[name])
