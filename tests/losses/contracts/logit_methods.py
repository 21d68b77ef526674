"""Losses between logits other than KD. See test_contract.py for the columns."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import losses


def normal(*shape):
    return lambda rng, batch: rng.standard_normal((batch, *shape)).astype(np.float32)


def label_vectors(rng, batch):
    return rng.dirichlet(np.ones(5), batch).astype(np.float32)


# Inputs "logits", "teacher", "labels", "map" and so on are those of core.py.
INPUTS = {
    "teacher_b": normal(5),
    "label_vectors": label_vectors,
    "second_map": normal(3, 4, 3),
    "teacher_second": normal(3, 4, 3),
}


def dkd(student, teacher, labels, **options):
    # At beta = 8 the rounding of gradients that cancel exceeds the tolerance.
    return losses.dkd(student, teacher, labels, beta=2.0, **options)


def standardized_kd(student, teacher, **options):
    student, teacher = (losses.standardize_logits(x) for x in (student, teacher))
    return losses.kd(student, jax.lax.stop_gradient(teacher), **options)


def class_correlation_of_some(student, teacher):
    where = losses.low_confidence_classes(teacher)
    return losses.class_correlation(student, teacher, where=where)


def function_matching(student, *teachers, **options):
    return losses.function_matching(student, teachers, **options)


def averaged_kd(student, *teachers, **options):
    return losses.averaged_kd(student, teachers, shares=[1, 3], **options)


def kd_of_probabilities(student, *teachers, **options):
    teacher = losses.averaged_probabilities(teachers, temperature=4.0)
    return losses.kd(student, teacher, **options)


def kd_of_logits(student, *teachers, **options):
    return losses.kd(student, losses.averaged_logits(teachers), **options)


def ebkd(student, *teachers):
    return losses.ebkd(student, teachers)


def camkd(student, first, second, labels):
    return losses.camkd(student, [first, second], labels)


def weighted_hint(first, second, teacher_first, teacher_second):
    # One row per teacher; equal for all examples, since the batch will be permuted.
    weights = jnp.outer(jnp.array([0.2, 0.8]), jnp.ones(len(first)))
    return losses.weighted_hint(
        [first, second], [teacher_first, teacher_second], weights
    )


LOSSES = [
    ("dkd", dkd, "logits teacher labels", "identity where shift"),
    ("dkd_target", losses.dkd_target, "logits teacher labels", "identity where shift"),
    (
        "dkd_nontarget",
        losses.dkd_nontarget,
        "logits teacher label_vectors",
        "identity where shift",
    ),
    (
        "dkd_pixels",
        dkd,
        "pixels teacher_pixels pixel_labels",
        "identity where shift pixels",
    ),
    ("nkd", losses.nkd, "logits teacher labels", "where shift"),
    ("nkd_vectors", losses.nkd, "logits teacher label_vectors", "where shift"),
    ("nkd_pixels", losses.nkd, "pixels teacher_pixels pixel_labels", "where pixels"),
    ("dist", losses.dist, "logits teacher", "coupled shift"),
    ("dist_pixels", losses.dist, "pixels teacher_pixels", "coupled shift pixels"),
    ("dist_inter", losses.dist_inter, "logits teacher", "shift"),
    ("dist_intra", losses.dist_intra, "logits teacher", "coupled shift"),
    ("standardized_kd", standardized_kd, "logits teacher", "identity where shift"),
    ("class_correlation", losses.class_correlation, "logits teacher", "coupled shift"),
    (
        "class_correlation_of_some",
        class_correlation_of_some,
        "logits teacher",
        "coupled shift",
    ),
    (
        "batch_correlation",
        losses.batch_correlation,
        "logits teacher",
        "coupled identity shift",
    ),
    ("wsld", losses.wsld, "logits teacher labels", "where shift detached"),
    (
        "wsld_vectors",
        losses.wsld,
        "logits teacher label_vectors",
        "where shift detached",
    ),
    ("hard_distillation", losses.hard_distillation, "logits teacher", "where shift"),
    (
        "function_matching",
        function_matching,
        "logits teacher teacher_b",
        "identity where shift",
    ),
    ("averaged_kd", averaged_kd, "logits teacher teacher_b", "identity where shift"),
    ("kd_of_probabilities", kd_of_probabilities, "logits teacher teacher_b", "where"),
    ("kd_of_logits", kd_of_logits, "logits teacher teacher_b", "where shift"),
    ("ebkd", ebkd, "logits teacher teacher_b", "identity shift"),
    ("camkd", camkd, "logits teacher teacher_b labels", "identity shift"),
    (
        "weighted_hint",
        weighted_hint,
        "map second_map teacher_map teacher_second",
    ),
]
