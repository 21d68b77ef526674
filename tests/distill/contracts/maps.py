"""Attention, selectivity, flow, factors, activations, singular vectors."""

METHODS = [
    ("at", {}, "classification"),
    ("at_paper", {"name": "at", "norm": "paper", "exponent": 4}, "classification"),
    ("nst", {}, "classification"),
    ("fsp", {}, "equal"),
    ("ft", {}, "memory"),
    ("ft_paper", {"name": "ft", "variant": "paper", "k": 1.0}, "memory"),
    ("ab", {}, "memory"),
    ("ofd", {}, "memory"),
    ("kdsvd", {}, "classification"),
]
