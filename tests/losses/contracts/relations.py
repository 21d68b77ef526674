"""Relational and contrastive losses. See test_contract.py for the columns."""

import jax.numpy as jnp
import numpy as np

from jaxkd import losses

RECORDS, NEGATIVES = 12, 5


def normal(*shape):
    return lambda rng, batch: rng.standard_normal((batch, *shape)).astype(np.float32)


INPUTS = {
    "related": normal(3, 4),
    "teacher_related": normal(3, 4),
    "teacher_related_wide": normal(2, 2, 5),
    "embedding": normal(6),
    "other_embedding": normal(6),  # trained as well: it does get a gradient
    "embedding_labels": lambda rng, batch: rng.integers(0, 3, batch).astype(np.int32),
    "compared": lambda rng, batch: rng.integers(
        0, RECORDS, (batch, 1 + NEGATIVES)
    ).astype(np.int32),
}


def banks():
    rng = np.random.default_rng(1)
    drawn = rng.standard_normal((2, RECORDS, 6))
    drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
    return jnp.asarray(drawn, jnp.float32)


def crd(student, embedding, records, **options):
    # The published temperature of 0.07 is too sharp for finite differences.
    return losses.crd(student, embedding, *banks(), records, temperature=0.5, **options)


def crd_later(student, embedding, records):
    return crd(student, embedding, records, normalizers=(20.0, 8.0))


def crd_in_batch(student, embedding, labels):
    return losses.crd_in_batch(student, embedding, labels, temperature=0.5)


SAME = "related teacher_related"
WIDE = "related teacher_related_wide"
PAIR = "embedding other_embedding"

LOSSES = [
    ("sp", losses.sp, SAME, "coupled identity"),
    ("sp_wide", losses.sp, WIDE, "coupled"),
    ("cc", losses.cc, PAIR, "coupled ordered"),
    ("cc_rbf", losses.cc_rbf, SAME, "coupled identity"),
    ("cc_rbf_wide", losses.cc_rbf, WIDE, "coupled"),
    ("rkd_distance", losses.rkd_distance, SAME, "coupled identity"),
    ("rkd_distance_wide", losses.rkd_distance, WIDE, "coupled"),
    ("rkd_angle", losses.rkd_angle, SAME, "coupled identity"),
    ("rkd_angle_wide", losses.rkd_angle, WIDE, "coupled"),
    ("pkt", losses.pkt, SAME, "coupled"),
    ("pkt_wide", losses.pkt, WIDE, "coupled"),
    ("crd", crd, f"{PAIR} compared", "coupled detached"),
    ("crd_later", crd_later, f"{PAIR} compared"),
    ("crd_in_batch", crd_in_batch, f"{PAIR} embedding_labels", "coupled"),
]
