"""Reads a config file and the changes made on the command line.

`configs/kd.py:digits` names a Python file with `get_config(arg="")` that returns an
`ml_collections.ConfigDict`, and a variant. `--config.a.b=value` replaces one value;
values are Python literals, anything else is text.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from jaxkd.training.schema import ConfigError, one_line, plain

_WORDS = {"true": True, "false": False, "none": None}


def load_config(spec: str) -> dict[str, Any]:
    """Runs `get_config` of a config file.

    Args:
      spec: `FILE` or `FILE:variant`.

    Returns:
      Plain nested dicts and tuples.

    Raises:
      ConfigError: no such file or variant, or the file fails.
    """
    file, _, variant = spec.partition(":")
    path = Path(file)
    if not path.is_file():
        nearby = sorted(p.name for p in path.parent.glob("*.py"))
        hint = f"; {path.parent} has {', '.join(nearby)}" if nearby else ""
        raise ConfigError(f"--config: no file {file!r}{hint}")
    module_spec = importlib.util.spec_from_file_location(
        f"jaxkd_config_{path.stem}", path
    )
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"--config: {file!r} is not a Python file (*.py)")
    module = importlib.util.module_from_spec(module_spec)
    try:
        with _siblings(path.parent):
            module_spec.loader.exec_module(module)
            if not hasattr(module, "get_config"):
                raise ConfigError(
                    f"--config: {file} has no function get_config(arg='')"
                )
            takes_variant = bool(inspect.signature(module.get_config).parameters)
            if variant and not takes_variant:
                raise ConfigError(f"--config: {file} has no variants, got {variant!r}")
            config = (
                module.get_config(variant) if takes_variant else module.get_config()
            )
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"--config: {_located(error, file)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"--config: get_config of {file} must return an "
            f"ml_collections.ConfigDict, got {type(config).__name__}"
        )
    return plain(config.to_dict())


@contextlib.contextmanager
def _siblings(folder: Path) -> Iterator[None]:
    """Lets a config import files beside it, and forgets them afterwards.

    Another config's file of the same name must not be taken for one of these.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).parent == folder.resolve():
                del sys.modules[name]


def _located(error: Exception, file: str) -> str:
    """The error's text, with the config file's line unless it was raised on purpose."""
    if isinstance(error, ValueError | KeyError):
        return one_line(error)
    if isinstance(error, SyntaxError):
        return f"{file}, line {error.lineno}: {error.msg}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).name == Path(file).name
    ]
    where = f"{file}, line {lines[-1]}" if lines else file
    return f"{where}: {type(error).__name__}: {one_line(error)}"


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Splits `--config.key=value` and `--config.key value` into pairs.

    Raises:
      ConfigError: an argument of another form.
    """
    pairs: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--config."):
            raise ConfigError(
                f"unknown argument {argument!r}; config values are changed with "
                "--config.key=value"
            )
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--config.{key}: no value; write --config.{key}=...")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def apply_overrides(
    config: dict[str, Any], overrides: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Returns `config` with values replaced; new keys are left to the schema check.

    Raises:
      ConfigError: a key below something that is not a group, or a group replaced
        by a value.
    """
    config = _copy(config)
    for key, text in overrides:
        *parents, last = key.split(".")
        node = config
        for depth, parent in enumerate(parents):
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                group = ".".join(parents[: depth + 1])
                raise ConfigError(
                    f"config.{key}: config.{group} is a value, not a group of keys"
                )
        old = node.get(last)
        value = text if isinstance(old, str) else parse_value(text)
        if isinstance(old, dict) and not isinstance(value, dict):
            raise ConfigError(
                f"config.{key}: is a group with the keys {', '.join(old) or '(none)'}; "
                f"set one of them, e.g. --config.{key}.{next(iter(old), 'key')}=..."
            )
        node[last] = plain(value)
    return config


def parse_value(text: str) -> Any:
    """A command-line value: a Python literal, true/false/none, or text.

    >>> parse_value("1e-3"), parse_value("(1, 2)"), parse_value("data/lits")
    (0.001, (1, 2), 'data/lits')
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """The keys in which two configs differ, as `config.a.b: 1 -> 2`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in [*old, *(k for k in new if k not in old)]:
            inner = f"{path}.{key}"
            if key not in new:
                lines.append(f"{inner}: {old[key]!r} -> (absent)")
            elif key not in old:
                lines.append(f"{inner}: (absent) -> {new[key]!r}")
            else:
                lines += differences(old[key], new[key], inner)
        return lines
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def jsonable(config: Any) -> Any:
    """The config as JSON would give it back (tuples become lists)."""
    return json.loads(json.dumps(config))


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value
