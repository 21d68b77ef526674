"""Relational and contrastive methods: (name, options, kind)."""

METHODS = [
    ("sp", {}, "classification"),
    ("cc", {"dim": 4}, "classification"),
    ("cc", {"variant": "rbf", "factor": 100.0}, "classification"),
    ("rkd", {}, "classification"),
    ("pkt", {}, "classification"),
    ("crd", {"negatives": 4, "dim": 6}, "memory"),
    ("crd", {"negatives": 4, "dim": 6, "mode": "relax"}, "memory"),
    ("crd_in_batch", {"dim": 6}, "classification"),
]
