"""Self-distillation, MEAL, stored labels. See test_contract.py for the columns."""

import numpy as np

from jaxkd import losses


def probabilities(rng, batch):
    """Soft labels whose entries differ, so that the two largest are well defined."""
    return rng.dirichlet(np.ones(5), batch).astype(np.float32)


def features(rng, batch):
    return rng.standard_normal((batch, 4)).astype(np.float32)


def judgements(rng, batch):
    return rng.standard_normal((batch, 2)).astype(np.float32)


INPUTS = {
    "teacher_weak": lambda rng, batch: rng.normal(size=(batch, 5)).astype(np.float32),
    "soft_labels": probabilities,
    "teacher_past": probabilities,
    "features": features,
    "teacher_features": features,
    "judged_student": judgements,
    "judged_network": judgements,
}


def uskd_rank_prob(student, weak, labels):
    return losses.uskd_nontarget(student, weak, labels, rank="prob")


def pskd(student, past, labels, **options):
    return losses.pskd(student, past, labels, alpha=0.3, **options)


def tfkd_self(student, teacher, **options):
    # T^2 amplifies rounding; 4 is what the other rows have.
    return losses.tfkd_self(student, teacher, temperature=4.0, **options)


def dml_of_the_code(student, peer):
    return losses.dml(student, peer, eps=1e-8)


def meal_similarity(kind):
    def function(student, teacher):
        return losses.meal_similarity(student, teacher, kind=kind)

    return function


LOSSES = [
    ("uskd_target", losses.uskd_target, "logits labels", "coupled detached shift"),
    (
        "uskd_target_soft",
        losses.uskd_target,
        "logits soft_labels",
        "coupled detached shift",
    ),
    (
        "uskd_nontarget",
        losses.uskd_nontarget,
        "logits teacher_weak labels",
        "detached shift",
    ),
    ("uskd_rank_prob", uskd_rank_prob, "logits teacher_weak labels", "detached shift"),
    (
        "uskd_nontarget_soft",
        losses.uskd_nontarget,
        "logits teacher_weak soft_labels",
        "detached shift",
    ),
    ("uskd_weak", losses.uskd_weak, "logits labels", "shift all_classes"),
    ("pskd", pskd, "logits teacher_past labels", "where shift all_classes"),
    ("tfkd_reg", losses.tfkd_regularization, "logits labels", "where shift"),
    ("tfkd_self", tfkd_self, "logits teacher", "identity where shift"),
    ("byot_feature", losses.byot_feature, "features teacher_features", "coupled"),
    ("dml", losses.dml, "logits teacher", "identity shift"),
    ("dml_of_the_code", dml_of_the_code, "logits teacher", "shift"),
    (
        "soft_cross_entropy",
        losses.soft_cross_entropy,
        "logits teacher_past",
        "where all_classes",
    ),
    ("discriminator_loss", losses.discriminator_loss, "judged_student judged_network"),
    ("meal_ce", meal_similarity("ce"), "logits teacher", "shift"),
    (
        "meal_l1",
        meal_similarity("l1"),
        "logits teacher",
        "identity detached all_classes",
    ),
    ("meal_l2", meal_similarity("l2"), "logits teacher", "identity all_classes"),
    ("meal_l1_soft", meal_similarity("l1_soft"), "logits teacher", "detached shift"),
    ("meal_l2_soft", meal_similarity("l2_soft"), "logits teacher", "identity shift"),
]
