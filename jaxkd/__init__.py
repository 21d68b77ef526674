"""jaxkd: make vision models small, fast and trustworthy by teaching them.

Subpackages are imported on first use, so `import jaxkd` stays fast.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBPACKAGES = (
    "analysis",
    "data",
    "distill",
    "layers",
    "losses",
    "metrics",
    "models",
    "report",
    "training",
)

__all__ = ["__version__", *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"jaxkd.{name}")
    raise AttributeError(f"module 'jaxkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBPACKAGES])
