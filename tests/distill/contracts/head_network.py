"""Methods that restore the teacher's features."""

METHODS = [
    ("ghnd", {}, "equal"),
    ("hnd", {}, "equal"),
]
