"""Channels, structure, class variation, cross-image relations, MGD-SSSS."""

SMALL_QUEUES = {
    "pixel_memory": 32,
    "region_memory": 9,
    "pixel_contrast": 9,
    "region_contrast": 6,
    "pixels_per_class": 2,
}

METHODS = [
    ("cwd", {}, "segmentation"),
    (
        "cwd_features",
        {"name": "cwd", "factor": 50.0, "student_tap": "e2", "teacher_tap": "e2"},
        "segmentation",
    ),
    ("skd_pixel", {}, "segmentation"),
    ("skd_pair", {"student_tap": "e2", "teacher_tap": "e4"}, "segmentation"),
    ("skd_holistic", {"width": 4, "image_channels": 1}, "segmentation"),
    ("skd", {"student_tap": "e3", "teacher_tap": "e3", "width": 4}, "segmentation"),
    ("ifvd", {}, "segmentation"),
    ("cirkd", SMALL_QUEUES, "segmentation"),
    ("mgd_ssss", {}, "segmentation"),
    (
        "mgd_ssss_reported",
        {
            "name": "mgd_ssss",
            "teacher_terms": True,
            "teacher_bn": "eval",
            "sem_reduction": "mean",
        },
        "segmentation",
    ),
]
