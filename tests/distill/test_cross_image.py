import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill, losses
from jaxkd.distill.cross_image import pooled

SIZES = {
    "pixel_memory": 8,
    "region_memory": 4,
    "pixel_contrast": 6,
    "region_contrast": 5,
    "pixels_per_class": 3,
}


def create(**options):
    options = {"student_tap": "e3", "teacher_tap": "e4", **SIZES, **options}
    return distill.create("cirkd", **options)


@pytest.fixture
def run(segmentation):
    """Maps of 4x4; one corner of one image is not labelled."""
    label = segmentation.batch["label"].at[0, :16, :16].set(255)
    return dataclasses.replace(segmentation, batch={"label": label})


def test_state_has_queues_per_class(run):
    params, memory = run.init(create())
    assert set(params) == {"projector"}
    assert params["projector"]["conv0"]["kernel"].shape == (1, 1, 4, 6)
    assert memory["pixels"]["entries"].shape == (2, 8, 6)
    assert memory["regions"]["entries"].shape == (2, 4, 6)
    assert memory["regions"]["next"].dtype == jnp.int32


def test_terms_and_memory_over_two_steps(run):
    method = create()
    params, memory = run.init(method)
    step = jax.jit(method.terms)
    terms, first = step(params, memory, run.inputs())
    expected = losses.cirkd_minibatch(run.student.taps["e3"], run.teacher.taps["e4"])
    np.testing.assert_allclose(terms["minibatch"], expected, rtol=1e-5)
    assert terms["memory_pixel"].shape == terms["memory_region"].shape == (2, 4, 4)
    # Pixels without a label take no part; the mean is over the others.
    for name in ("memory_pixel", "memory_region"):
        np.testing.assert_array_equal(terms[name][0, :2, :2], 0)
        assert jnp.all(terms[name][1] > 0)
    # Both classes occur in both images, each with at least three pixels.
    np.testing.assert_array_equal(first["regions"]["next"], [2, 2])
    np.testing.assert_array_equal(first["pixels"]["next"], [6, 6])
    _, second = step(params, first, run.inputs(seed=3))
    np.testing.assert_array_equal(second["regions"]["next"], [0, 0])
    np.testing.assert_array_equal(second["pixels"]["next"], [4, 4])
    stored = first["regions"]["entries"][:, :2]
    np.testing.assert_array_equal(second["regions"]["entries"][:, :2], stored)
    before, after = (m["projector"]["batch_stats"] for m in (memory, second))
    assert jnp.any(before["norm"]["mean"] != after["norm"]["mean"])


def test_regions_are_the_teachers_class_means(run):
    method = create()
    _, memory = jax.jit(method.terms)(*run.init(method), run.inputs())
    teacher = np.asarray(run.teacher.taps["e4"], np.float64)
    unit = teacher / np.linalg.norm(teacher, axis=-1, keepdims=True)
    labels = np.asarray(run.batch["label"])[:, ::8, ::8]
    for y in range(2):
        for image in range(2):
            mean = unit[image][labels[image] == y].mean(0)
            np.testing.assert_allclose(
                memory["regions"]["entries"][y, image],
                mean / np.linalg.norm(mean),
                rtol=1e-4,
            )


def test_without_any_label_the_memory_stays_and_its_terms_are_zero(run):
    method = create()
    params, memory = run.init(method)
    nothing = {"label": jnp.full_like(run.batch["label"], 255)}
    inputs = run.inputs().replace(batch=nothing)
    terms, after = jax.jit(method.terms)(params, memory, inputs)
    np.testing.assert_array_equal(terms["memory_pixel"], 0)
    np.testing.assert_array_equal(
        after["pixels"]["entries"], memory["pixels"]["entries"]
    )


@pytest.mark.parametrize(
    ("size", "pool", "expected"),
    [
        ((256, 300), None, (64, 75)),
        ((255, 300), None, (255, 300)),
        ((9, 8), 2, (5, 4)),
        ((300, 300), 1, (300, 300)),
    ],
)
def test_large_maps_are_pooled_for_the_pairs_of_images(size, pool, expected):
    x = jnp.zeros((1, *size, 2))
    assert jax.eval_shape(lambda: pooled(x, pool)).shape[1:3] == expected


def test_errors_are_one_line(run, classification):
    with pytest.raises(
        ValueError, match="pixel_memory is 5, but a step writes up to 6"
    ):
        run.init(create(pixel_memory=5))
    with pytest.raises(ValueError, match="region_memory is 4, .* reads 6; make it at"):
        run.init(create(region_contrast=10))
    with pytest.raises(ValueError, match="pool must be > 0, got 0"):
        create(pool=0)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        create(temperature=0.0)
    with pytest.raises(ValueError, match=r"is 1x1 .* is 2x2; set student_tap and"):
        run.init(create(student_tap="e5", teacher_tap="e5"))
    with pytest.raises(ValueError, match="method 'cirkd' needs logits"):
        classification.init(create())
