import pytest

from jaxkd.distill import checks
from jaxkd.layers import NetworkSpec

CLASSIFIER = NetworkSpec(name="small", logits=(10,), taps={"pooled": (64,)})
SEGMENTER = NetworkSpec(name="unet", logits=(8, 8, 2), taps={"e1": (8, 8, 4)})


def test_equal_logits_pass():
    checks.check_same_logits(SEGMENTER, SEGMENTER)


def test_class_mismatch_names_both_networks():
    with pytest.raises(ValueError, match="give networks 'unet' and 'small'"):
        checks.check_same_logits(CLASSIFIER, SEGMENTER)


def test_segmentation_needs_pixels_and_two_classes():
    checks.check_segmentation("dice", SEGMENTER)
    one = NetworkSpec(name="one", logits=(8, 8, 1), taps={})
    for network in (CLASSIFIER, one):
        with pytest.raises(ValueError, match="method 'dice' needs logits"):
            checks.check_segmentation("dice", network)


def test_feature_map_gives_the_shape():
    assert checks.feature_map(SEGMENTER, "e1") == (8, 8, 4)


def test_feature_map_names_missing_taps_and_vectors():
    with pytest.raises(KeyError, match="no tap 'e9'; it has e1"):
        checks.feature_map(SEGMENTER, "e9")
    with pytest.raises(ValueError, match=r"'pooled' of network 'small' has shape"):
        checks.feature_map(CLASSIFIER, "pooled")
