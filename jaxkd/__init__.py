"""jaxkd: make vision models small, fast and trustworthy by teaching them.

Subpackages are imported on first use, so `import jaxkd` stays fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxkd import (
        analysis,
        compression,
        data,
        distill,
        exchange,
        layers,
        losses,
        metrics,
        models,
        report,
        select,
        sparsity,
        training,
    )

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "analysis",
    "compression",
    "data",
    "distill",
    "exchange",
    "layers",
    "losses",
    "metrics",
    "models",
    "report",
    "select",
    "sparsity",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"jaxkd.{name}")
    raise AttributeError(f"module 'jaxkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
