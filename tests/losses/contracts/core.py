"""Supervised losses, Hinton's KD, HLFD. See test_contract.py for the columns."""

import jax.numpy as jnp
import numpy as np

from jaxkd import losses


def normal(*shape):
    return lambda rng, batch: rng.standard_normal((batch, *shape)).astype(np.float32)


def classes(count, *shape):
    return lambda rng, batch: rng.integers(0, count, (batch, *shape)).astype(np.int32)


# Example inputs by name. What begins with "teacher" must get no gradient.
INPUTS = {
    "logits": normal(5),
    "labels": classes(5),
    "teacher": normal(5),
    "pixels": normal(2, 3, 4),
    "pixel_labels": classes(4, 2, 3),
    "teacher_pixels": normal(2, 3, 4),
    "sigmoids": normal(2, 3),
    "targets": classes(2, 2, 3),
    "map": normal(3, 4, 3),
    "small_map": normal(2, 3, 4),
    "teacher_map": normal(3, 4, 3),
    "teacher_small": normal(2, 3, 4),
    "teacher_wide": normal(3, 2, 2),
    "mask": classes(2, 4, 6),
}


def kernel(channels, width):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal((channels, width)), jnp.float32)


def smoothed(logits, labels, **options):
    return losses.cross_entropy(logits, labels, label_smoothing=0.1, **options)


def imd_unified(student, *teachers):
    return losses.unified_importance_map_distillation(student, teachers)


def imd_concatenated(first, second, teacher):
    return losses.concatenated_importance_map_distillation([first, second], teacher)


def pmd_projected(student, teacher):
    return losses.prediction_map_distillation(student, teacher, kernel(3, 4))


def pmd_unified(student, *teachers):
    return losses.unified_prediction_map_distillation(
        student, teachers, kernel(6, 3), kernel(1, 3)[0]
    )


def pmd_concatenated(first, second, teacher):
    return losses.concatenated_prediction_map_distillation(
        [first, second], teacher, kernel(7, 2)
    )


LOSSES = [
    ("cross_entropy", losses.cross_entropy, "logits labels", "where shift"),
    (
        "cross_entropy_pixels",
        losses.cross_entropy,
        "pixels pixel_labels",
        "pixels where shift",
    ),
    ("cross_entropy_smoothed", smoothed, "logits labels", "where shift all_classes"),
    ("focal", losses.focal, "logits labels", "where shift detached"),
    (
        "focal_pixels",
        losses.focal,
        "pixels pixel_labels",
        "pixels where shift detached",
    ),
    ("dice", losses.dice, "pixels pixel_labels", "shift"),
    ("batch_dice", losses.batch_dice, "pixels pixel_labels", "coupled shift"),
    ("binary_bce", losses.binary_bce, "sigmoids targets"),
    ("binary_dice", losses.binary_dice, "sigmoids targets", "coupled"),
    ("bce_dice", losses.bce_dice, "sigmoids targets", "coupled"),
    ("kd", losses.kd, "logits teacher", "identity where shift"),
    ("kd_pixels", losses.kd, "pixels teacher_pixels", "identity pixels where shift"),
    ("kd_cross_entropy", losses.kd_cross_entropy, "logits teacher", "where shift"),
    ("imd", losses.importance_map_distillation, "map teacher_map", "identity"),
    ("imd_resized", losses.importance_map_distillation, "map teacher_small"),
    ("imd_unified", imd_unified, "map teacher_small teacher_wide"),
    ("imd_concatenated", imd_concatenated, "map small_map teacher_wide"),
    ("pmd", losses.prediction_map_distillation, "map teacher_map", "identity shift"),
    ("pmd_projected", pmd_projected, "map teacher_small"),
    ("pmd_unified", pmd_unified, "map teacher_small teacher_wide", "shift"),
    ("pmd_concatenated", pmd_concatenated, "map small_map teacher_wide"),
    ("region_affinity", losses.region_affinity, "map teacher_map mask", "identity"),
]
