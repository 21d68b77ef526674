"""The baselines are sums of transfers: each against its row in the comparison."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses


@pytest.fixture
def parts(segmentation):
    """Importance and prediction transfers of one run, by tap names."""
    s, t = segmentation.student.taps, segmentation.teacher.taps

    class Parts:
        def imd(self, student, teacher):
            return losses.importance_map_distillation(s[student], t[teacher])

        def pmd(self, memory, student, teacher):
            kernel, bias = memory[student]["kernel"], memory[student]["bias"]
            return losses.prediction_map_distillation(
                s[student], t[teacher], kernel, bias
            )

    return Parts()


def run(segmentation, name):
    method = distill.create(name, projection="fixed")
    state = segmentation.init(method)
    return segmentation.terms(method, state=state), state[1]


def test_seg_at_is_imd_of_the_last_encoder_layer(segmentation, parts):
    method = distill.create("seg_at")
    assert method.weights == {"flfd": 1.0}
    value = segmentation.terms(method)["flfd"]
    np.testing.assert_allclose(value, parts.imd("e5", "e5"), rtol=1e-5)


def test_seg_skd_uses_last_layers_only(segmentation, parts):
    values, memory = run(segmentation, "seg_skd")
    np.testing.assert_allclose(values["flfd"], parts.imd("e5", "e5"), rtol=1e-5)
    expected = parts.pmd(memory, "out", "out")
    np.testing.assert_allclose(values["plfd"], expected, rtol=1e-5)


def test_seg_deep_uses_every_layer_and_d5_against_itself(segmentation, parts):
    values, memory = run(segmentation, "seg_deep")
    flfd = sum(parts.imd(tap, tap) for tap in ("e1", "e2", "e3", "e4", "e5"))
    np.testing.assert_allclose(values["flfd"], flfd, rtol=1e-5)
    x = segmentation.student.taps["d5"]
    projected = losses.project([x], memory["d5"]["kernel"], memory["d5"]["bias"])
    plfd = losses.prediction_map_divergence(projected, x)
    plfd += sum(parts.pmd(memory, tap, tap) for tap in ("out", "d4", "d3", "d2"))
    np.testing.assert_allclose(values["plfd"], plfd, rtol=1e-5)


def test_hifd_feeds_the_last_layers_back(segmentation, parts):
    values, memory = run(segmentation, "hifd")
    flfd = sum(parts.imd(tap, "e5") for tap in ("e5", "e2", "e4"))
    np.testing.assert_allclose(values["flfd"], flfd, rtol=1e-5)
    plfd = sum(parts.pmd(memory, tap, "out") for tap in ("out", "d4", "d2"))
    np.testing.assert_allclose(values["plfd"], plfd, rtol=1e-5)


def test_ifd_feeds_back_to_concatenated_layers(segmentation, parts):
    values, memory = run(segmentation, "ifd")
    s, t = segmentation.student.taps, segmentation.teacher.taps
    encoder = [s[tap] for tap in ("e1", "e2", "e3", "e4")]
    flfd = losses.concatenated_importance_map_distillation(encoder, t["e5"])
    flfd += parts.imd("e5", "e5")
    np.testing.assert_allclose(values["flfd"], flfd, rtol=1e-5)
    joined = jnp.concatenate([s[tap] for tap in ("d5", "d4", "d3", "d2")], axis=-1)
    projection = memory["d5_d4_d3_d2"]
    plfd = losses.prediction_map_distillation(
        joined, t["out"], projection["kernel"], projection["bias"]
    )
    plfd += parts.pmd(memory, "out", "out")
    np.testing.assert_allclose(values["plfd"], plfd, rtol=1e-5)


@pytest.mark.parametrize("name", ["seg_skd", "seg_deep", "hifd", "ifd"])
def test_baselines_share_the_weights_of_hlfd(name):
    assert distill.create(name).weights == {"flfd": 0.9, "plfd": 0.1}
    other = distill.create(name, alpha=0.5, beta=0.0)
    assert other.weights == {"flfd": 0.0, "plfd": 0.5}


@pytest.mark.parametrize("name", ["seg_at", "seg_skd", "seg_deep", "hifd", "ifd"])
def test_impossible_options_are_an_error(name):
    with pytest.raises(ValueError, match="exponent must be a positive even integer"):
        distill.create(name, exponent=3)


class TestEmkd:
    def test_is_the_published_sum(self, segmentation, parts):
        values = segmentation.terms(distill.create("emkd"))
        foreground = segmentation.batch["label"] > 0
        s, t = segmentation.student.taps, segmentation.teacher.taps
        importance = parts.imd("e2", "e2") + parts.imd("e5", "e5")
        np.testing.assert_allclose(values["importance"], importance, rtol=1e-5)
        region = sum(
            losses.region_affinity(s[tap], t[tap], foreground) for tap in ("e2", "e5")
        )
        np.testing.assert_allclose(values["region"], region, rtol=1e-5)
        prediction = losses.prediction_map_distillation(s["out"], t["out"])
        np.testing.assert_allclose(values["prediction"], prediction, rtol=1e-5)

    def test_weights_are_the_published_ones(self):
        assert distill.create("emkd").weights == {
            "prediction": 0.1,
            "importance": 0.9,
            "region": 0.9,
        }

    def test_has_no_projection(self, segmentation):
        assert segmentation.init(distill.create("emkd")) == ({}, {})

    def test_other_layers_may_be_named(self, segmentation, parts):
        values = segmentation.terms(distill.create("emkd", low="e1", high="e4"))
        expected = parts.imd("e1", "e1") + parts.imd("e4", "e4")
        np.testing.assert_allclose(values["importance"], expected, rtol=1e-5)

    def test_refuses_classifiers_and_missing_taps(self, classification, segmentation):
        with pytest.raises(ValueError, match="method 'emkd' needs logits"):
            classification.init(distill.create("emkd"))
        with pytest.raises(KeyError, match="no tap 'e9'"):
            segmentation.init(distill.create("emkd", low="e9"))

    def test_impossible_options_are_an_error(self):
        with pytest.raises(ValueError, match="temperature must be > 0"):
            distill.create("emkd", temperature=-1.0)
        with pytest.raises(ValueError, match="exponent must be"):
            distill.create("emkd", exponent=1)
