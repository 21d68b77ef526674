import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses


def with_batch(run, **batch):
    return dataclasses.replace(run, batch={**run.batch, **batch})


@pytest.mark.parametrize(
    "name, loss", [("ce", losses.cross_entropy), ("focal", losses.focal)]
)
def test_classification_and_segmentation(name, loss, classification, segmentation):
    for run in (classification, segmentation):
        value = run.terms(distill.create(name))[name]
        expected = loss(run.student.logits, run.batch["label"])
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_ce_smooths_labels(classification):
    method = distill.create("ce", label_smoothing=0.1)
    expected = losses.cross_entropy(
        classification.student.logits,
        classification.batch["label"],
        label_smoothing=0.1,
    )
    np.testing.assert_allclose(classification.terms(method)["ce"], expected)


@pytest.mark.parametrize("name", ["ce", "focal"])
def test_mixed_labels_take_the_place_of_the_label(name, classification):
    target = jnp.full((2, 5), 0.2)
    mixed = with_batch(classification, target=target)
    value = mixed.terms(distill.create(name))[name]
    loss = {"ce": losses.cross_entropy, "focal": losses.focal}[name]
    expected = loss(classification.student.logits, target)
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize(
    "over, loss", [("example", losses.dice), ("batch", losses.batch_dice)]
)
def test_dice_over_the_example_or_the_batch(over, loss, segmentation):
    value = segmentation.terms(distill.create("dice", over=over, smooth=2.0))["dice"]
    expected = loss(
        segmentation.student.logits, segmentation.batch["label"], smooth=2.0
    )
    np.testing.assert_array_equal(value, expected)


def test_focal_dice_is_half_focal_and_half_batch_dice(segmentation):
    method = distill.create("focal_dice")
    assert method.weights == {"focal": 0.5, "dice": 0.5}
    logits, label = segmentation.student.logits, segmentation.batch["label"]
    values = segmentation.terms(method)
    np.testing.assert_array_equal(values["focal"], losses.focal(logits, label))
    np.testing.assert_array_equal(values["dice"], losses.batch_dice(logits, label))


@pytest.mark.parametrize("denominator", ["squared", "plain"])
def test_bce_dice_reads_two_classes_as_their_difference(segmentation, denominator):
    method = distill.create("bce_dice", denominator=denominator)
    logits = segmentation.student.logits
    expected = losses.bce_dice(
        logits[..., 1:] - logits[..., :1],
        segmentation.batch["label"][..., None],
        denominator=denominator,
    )
    value = segmentation.terms(method)["bce_dice"]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_bce_dice_accepts_soft_masks(segmentation):
    soft = jax.nn.one_hot(segmentation.batch["label"], 2)
    method = distill.create("bce_dice")
    value = with_batch(segmentation, target=soft).terms(method)["bce_dice"]
    np.testing.assert_allclose(value, segmentation.terms(method)["bce_dice"])


@pytest.mark.parametrize("name", ["dice", "bce_dice", "focal_dice"])
def test_segmentation_losses_refuse_classifiers(name, classification):
    with pytest.raises(ValueError, match="needs logits .* network 'student' has"):
        classification.init(distill.create(name))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ce", {"label_smoothing": 2.0}, "label_smoothing must be between 0 and 1"),
        ("focal", {"gamma": -1.0}, "gamma must be >= 0, got -1"),
        ("focal_dice", {"gamma": float("nan")}, "gamma must be >= 0, got nan"),
        ("dice", {"smooth": 0.0}, "smooth must be > 0, got 0"),
        ("bce_dice", {"smooth": -1.0}, "smooth must be > 0, got -1"),
    ],
)
def test_impossible_options_are_an_error(name, options, message):
    with pytest.raises(ValueError, match=message):
        distill.create(name, **options)
