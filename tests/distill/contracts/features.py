"""Methods that train connectors between features: `(name, options, kind)`."""

RISING = {"factor": lambda step: 0.5 + 0.1 * step}
POOLED = {"student_tap": "pooled", "teacher_tap": "pooled"}
TOKENS = {"student_tap": "tokens", "teacher_tap": "tokens"}
ENCODER = {"student_tap": "e5", "teacher_tap": "e5"}

METHODS = [
    ("hint", {}, "classification"),
    ("hint_vectors", {"name": "hint", **POOLED}, "classification"),
    ("hint_tokens", {"name": "hint", **TOKENS}, "tokens"),
    ("hint_maps", {"name": "hint", **ENCODER, **RISING}, "segmentation"),
    ("fitnet", RISING, "classification"),
    ("fitnet_half", {"name": "fitnet", "student_tap": "stage1"}, "classification"),
    ("vid", RISING, "classification"),
    ("vid_fixed", {"name": "vid", "train_variance": False}, "classification"),
    ("reviewkd", RISING, "classification"),
    ("mgd_masked", {"lambda_mgd": 0.5}, "classification"),
    (
        "mgd_pixels",
        {"name": "mgd_masked", "mask_unit": "pixels", **ENCODER},
        "segmentation",
    ),
    ("srrl", {"beta": lambda step: 0.1 * step}, "classification"),
    ("simkd", {}, "classification"),
    ("vitkd", {}, "tokens"),
]
