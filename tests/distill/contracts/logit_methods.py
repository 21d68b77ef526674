"""Methods between logits, of one teacher and of several: (name, options, kind)."""

SCHEDULE = {"temperature": lambda step: 1.0 + step}

METHODS = [
    ("kd", SCHEDULE, "classification"),
    ("kd_pixels", {"name": "kd"}, "segmentation"),
    ("kd_cross_entropy", {}, "classification"),
    ("wsld", {"alpha": lambda step: 0.1 * step}, "classification"),
    ("logit_standardization", {}, "classification"),
    (
        "standardized_dkd",
        {"name": "logit_standardization", "base": "dkd", **SCHEDULE},
        "classification",
    ),
    ("dkd", {}, "classification"),
    ("dkd_pixels", {"name": "dkd", "warmup_epochs": 0, **SCHEDULE}, "segmentation"),
    ("nkd", {}, "classification"),
    ("dist", {"temperature": 4.0}, "classification"),
    ("dist_pixels", {"name": "dist"}, "segmentation"),
    ("mlld", {}, "views"),
    ("mlld_standardized", {"name": "mlld", "standardize": True}, "views"),
    ("mlld_paper", {"name": "mlld", "variant": "paper"}, "views"),
    ("deit", {}, "classification"),
    (
        "deit_soft",
        {"name": "deit", "distillation": "soft", "alpha": lambda step: 0.1},
        "classification",
    ),
    ("function_matching", {}, "teachers"),
    ("averaged_teachers", {"teacher_weights": (1.0, 2.0)}, "teachers"),
    (
        "averaged_probabilities",
        {"name": "averaged_teachers", "average": "probabilities"},
        "teachers",
    ),
    ("averaged_logits", {"name": "averaged_teachers", "average": "logits"}, "teachers"),
    ("ebkd", {}, "teachers"),
    ("camkd", {}, "teachers"),
    (
        "camkd_projected",
        {"name": "camkd", "hint_weights": "projected", "beta": 1.0},
        "teachers",
    ),
]
