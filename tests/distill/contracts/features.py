"""Methods that train connectors between features: `(name, options, kind)`."""

METHODS = [
    ("hint", {}, "classification"),
    ("hint", {"student_tap": "pooled", "teacher_tap": "pooled"}, "classification"),
    ("fitnet", {}, "classification"),
    ("vid", {}, "classification"),
    ("reviewkd", {}, "classification"),
    ("mgd_masked", {"lambda_mgd": 0.5}, "classification"),
    ("srrl", {}, "classification"),
    ("simkd", {}, "classification"),
]
