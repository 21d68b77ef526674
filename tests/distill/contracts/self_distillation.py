"""Self-distillation, mutual learning, MEAL and FKD: one row per method."""

METHODS = [
    ("uskd", {}, "classification"),
    ("uskd_prob", {"name": "uskd", "rank": "prob"}, "classification"),
    ("pskd", {}, "memory"),
    ("tfkd_reg", {}, "classification"),
    ("tfkd_self", {}, "classification"),
    ("byot", {}, "classification"),
    ("dml", {}, "peers"),
    ("dml_sum", {"name": "dml", "reduction": "sum", "eps": 1e-8}, "peers"),
    ("meal_v2", {}, "teachers"),
    (
        "meal_v2_probabilities",
        {
            "name": "meal_v2",
            "discriminator_inputs": "probabilities",
            "adversarial": "grl",
        },
        "teachers",
    ),
    ("meal", {}, "teachers"),
    ("meal_soft", {"name": "meal", "similarity": "l2_soft"}, "teachers"),
    (
        "fkd",
        {"labels": "teacher", "label_format": "marginal_renorm_k3"},
        "classification",
    ),
]
