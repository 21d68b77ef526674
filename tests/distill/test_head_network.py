"""GHND and HND: sums over taps and the batch, and what they ask of the networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, models
from jaxkd.layers import NetworkSpec, Outputs

SHAPES = {"stage2": (4, 4, 3), "stage3": (2, 2, 5), "stage4": (1, 1, 6)}


def features(seed, shapes):
    rng = np.random.default_rng(seed)
    taps = {
        k: jnp.asarray(rng.normal(size=(2, *s)), "float32") for k, s in shapes.items()
    }
    return Outputs(logits=jnp.zeros((2, 5)), taps=taps)


@pytest.fixture
def split(classification):
    """A student behind a bottleneck, and a teacher that has one more stage."""
    student = features(0, {"bottleneck": (5, 5, 1), **SHAPES, "pooled": (6,)})
    teacher = features(1, {"stage1": (8, 8, 2), **SHAPES, "pooled": (6,)})
    return dataclasses.replace(classification, student=student, teachers=(teacher,))


def errors(run, tap):
    difference = np.array(run.student.taps[tap]) - np.array(run.teacher.taps[tap])
    return (difference**2).reshape(2, -1).sum(1)


def test_ghnd_sums_over_stages_and_batch(split):
    expected = sum(errors(split, tap) for tap in SHAPES)
    mean = split.terms(distill.create("ghnd", reduction="mean"))
    assert mean.keys() == {"ghnd"}
    np.testing.assert_allclose(mean["ghnd"], expected, rtol=1e-6)
    published = split.terms(distill.create("ghnd"))["ghnd"]
    np.testing.assert_allclose(jnp.mean(published), expected.sum(), rtol=1e-6)


def test_hnd_restores_the_first_stage_only(split):
    expected = errors(split, "stage2")
    values = split.terms(distill.create("hnd"))
    np.testing.assert_allclose(jnp.mean(values["hnd"]), expected.sum(), rtol=1e-6)
    other = split.terms(distill.create("hnd", student_tap="stage3", reduction="mean"))
    np.testing.assert_allclose(other["hnd"], errors(split, "stage3"), rtol=1e-6)


def test_taps_by_name(split):
    method = distill.create(
        "ghnd", student_taps=("stage3", "pooled"), teacher_taps=("stage3", "pooled")
    )
    expected = errors(split, "stage3") + errors(split, "pooled")
    value = split.terms(method)["ghnd"]
    np.testing.assert_allclose(jnp.mean(value), expected.sum(), rtol=1e-6)


def test_methods_have_no_state_and_one_teacher(split):
    for name in ("ghnd", "hnd"):
        method = distill.create(name)
        assert jax.tree.leaves(split.init(method)) == []
        assert method.num_teachers == 1 and method.weights == {name: 1.0}


@pytest.mark.parametrize(
    "name, options, error, message",
    [
        ("ghnd", {"reduction": "max"}, TypeError, "option 'reduction' must be one of"),
        ("ghnd", {"student_taps": ("stage9",)}, KeyError, "'student' has no tap 'stag"),
        (
            "ghnd",
            {"student_taps": ("stage2",), "teacher_taps": ("stage1", "stage2")},
            ValueError,
            "'student' has 1 taps",
        ),
        (
            "hnd",
            {"teacher_tap": "stage3"},
            ValueError,
            r"'stage2' of 'student', of shape \(4, 4, 3\), with tap 'stage3' of 'teach",
        ),
        (
            "hnd",
            {"student_tap": "bottleneck"},
            KeyError,
            "'teacher' has no tap 'bottle",
        ),
    ],
)
def test_mistakes_are_named_before_any_array_exists(
    name, options, error, message, split
):
    with pytest.raises(error, match=message):
        split.init(distill.create(name, **options))


def test_a_network_without_stages_must_name_its_taps(segmentation):
    for name in ("ghnd", "hnd"):
        with pytest.raises(ValueError, match="no taps 'stage1'.*set student_taps"):
            segmentation.init(distill.create(name))


def test_the_published_pair_of_networks_fits_together():
    # A bottleneck network restores the features of the network it was made from.
    def spec(name, **options):
        network = models.create(name, num_classes=5, width_factor=1 / 16, **options)
        images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        outputs = jax.eval_shape(
            lambda key, x: network.init_with_output(key, x)[0],
            jax.random.key(0),
            images,
        )
        return NetworkSpec.from_outputs(name, outputs)

    data = distill.DataSpec(
        records=8, num_classes=5, batch_size=4, steps_per_epoch=2, epochs=1
    )
    for student, teacher, options in (
        (spec("bottlefit", base="resnet34"), spec("resnet34"), {}),
        (spec("bottlefit", base="resnet20"), spec("resnet20"), {}),
        (
            spec("bottlefit_seg"),
            spec("resnet18_seg"),
            {"student_taps": ("e3", "e4", "e5")},
        ),
    ):
        specs = distill.Specs(student=student, teachers=(teacher,), data=data)
        method = distill.create("ghnd", **options)
        assert method.init(jax.random.key(0), specs) == ({}, {})
