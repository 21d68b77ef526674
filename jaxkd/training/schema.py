"""From a config to frozen dataclasses, with errors that help.

`build` turns nested mappings into dataclasses by their type annotations. Every mistake
raises a `ConfigError` whose single line names the key, what came and the remedy.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from jaxkd.registry import describe, matches, nearest

T = TypeVar("T")


class ConfigError(Exception):
    """A mistake in a config; the text is one line for the user."""


@contextlib.contextmanager
def at(path: str) -> Iterator[None]:
    """Turns errors about values into a `ConfigError` that names the config key."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The text of an error on one line, without the quotes `KeyError` adds."""
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def build(cls: type[T], config: Any, path: str) -> T:
    """Builds dataclass `cls` from a mapping, recursively.

    A field annotated with a dataclass takes a mapping; `Mapping[str, Dataclass]` takes
    a mapping of mappings. A dataclass with a field called `options` collects the keys
    it does not know in there; they are checked by whom they are meant for.

    Raises:
      ConfigError: unknown or missing key, wrong type, or a value that the
        dataclass refuses.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{path}: must be a group of keys, got {config!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore
    open_ended = "options" in fields
    values: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, value in config.items():
        if key in fields and not (open_ended and key == "options"):
            values[key] = convert(hints[key], value, f"{path}.{key}")
        elif open_ended:
            options[key] = plain(value)
        else:
            raise ConfigError(f"{path}.{key}: unknown key; {nearest(key, fields)}")
    if open_ended:
        values["options"] = options
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise ConfigError(f"{path}.{name}: missing; {describe(hints[name])} needed")
    with at(path):
        return cls(**values)


def convert(hint: Any, value: Any, path: str) -> Any:
    """Checks `value` against a type hint and builds dataclasses inside it."""
    inner = _dataclass_in(hint)
    if inner is not None and isinstance(value, Mapping):
        return build(inner, value, path)
    if typing.get_origin(hint) is collections.abc.Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: must be a group of keys, got {value!r}")
        item = typing.get_args(hint)[1]
        return {k: convert(item, v, f"{path}.{k}") for k, v in value.items()}
    value = plain(value)
    if not matches(value, hint):
        raise ConfigError(f"{path}: must be {describe(hint)}, got {value!r}")
    return value


def plain(value: Any) -> Any:
    """Mappings as dicts and sequences as tuples, all the way down."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(plain(v) for v in value)
    return value


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass in `hint` or in `hint | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        found = [a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)]
        return typing.cast(type, found[0]) if found else None
    return hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None
