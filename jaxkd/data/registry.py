"""Data sources by name: `load("liver_ct_sample", split="train")`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxkd.data.source import OnError, Source, Split, check_split
from jaxkd.registry import Registry

_registry = Registry("data source", "jaxkd.data")
register = _registry.register
names = _registry.names


def load(
    name: str,
    *,
    split: Split,
    path: str | Path | None = None,
    on_error: OnError = "raise",
    **options: Any,
) -> Source:
    """Opens one side of a data set.

    Args:
      name: a registered source, see `names()`.
      split: "train" or "test".
      path: folder or file, for sources that read one.
      on_error: "raise" names a damaged file in an error when it is read; "skip" reads
        everything once at the start, leaves damaged records out and logs how many. For
        sources that read files.
      **options: the source's own.

    Returns:
      The source.

    Raises:
      KeyError: no such source.
      TypeError: an option that the source does not take, needs, or of a wrong type.
      ValueError: an impossible value, or a damaged file.
      FileNotFoundError: nothing at `path`, or a file is missing there.
      ImportError: the source needs a package of `pip install 'jaxkd[data]'`.
    """
    check_split(split)
    if path is not None:
        options["path"] = str(path)
    if on_error != "raise":
        options["on_error"] = on_error
    return _registry.create(name, split=split, **options)


def import_extra(module: str, source: str) -> Any:
    """Imports an optional package that a source needs.

    Raises:
      ImportError: it is not installed; the message says how to get it.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the data source {source!r} needs {module.partition('.')[0]}: "
            "pip install 'jaxkd[data]'"
        ) from error
