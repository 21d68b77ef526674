"""Named factories: how a config's names become networks, methods and sources.

A registry maps a name to a function with keyword-only options. Modules of its package
register themselves and are found by being there, so that adding one touches no list.
Options are checked against the function's signature before it is called.
"""

from __future__ import annotations

import collections.abc
import difflib
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the closest known one, or all of them.

    >>> nearest("temprature", ["temperature", "weight"])
    "did you mean 'temperature'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known) or 'none'}"


class Registry:
    """Factories of one kind, by name.

    Args:
      kind: what is registered, for messages ("network", "method", "data source").
      package: the package whose modules register factories when imported.
    """

    def __init__(self, kind: str, package: str):
        self.kind = kind
        self._package = package
        self._factories: dict[str, Callable[..., Any]] = {}
        self._discovered = False

    def register(self, *names: str) -> Callable[[F], F]:
        """Decorator: registers a function under its own name, or under `names`."""

        def decorate(factory: F) -> F:
            for name in names or (factory.__name__,):
                known = self._factories.get(name)
                if known is not None and known.__module__ != factory.__module__:
                    raise ValueError(
                        f"{self.kind} {name!r} is registered by {known.__module__} "
                        f"and by {factory.__module__}"
                    )
                self._factories[name] = factory
            return factory

        return decorate

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._discover()
        return sorted(self._factories)

    def get(self, name: str) -> Callable[..., Any]:
        """The factory called `name`.

        Raises:
          KeyError: no such name; the message gives the nearest one.
        """
        self._discover()
        if name not in self._factories:
            raise KeyError(f"no {self.kind} {name!r}; {nearest(name, self._factories)}")
        return self._factories[name]

    def create(self, name: str, /, **options: Any) -> Any:
        """Calls the factory `name` with checked options.

        Raises:
          KeyError: no such name.
          TypeError: an option that the factory does not take, or of a wrong type.
          ValueError: from the factory, for impossible values.
        """
        if is_reference(name):
            return call_reference(name, **options)
        factory = self.get(name)
        check_options(factory, options, f"{self.kind} {name!r}")
        return factory(**options)

    def _discover(self) -> None:
        if self._discovered:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self._package}.{module.name}")
        self._discovered = True


def is_reference(name: str) -> bool:
    """Whether a name means a Python object, as `"package.module:function"` does."""
    return ":" in name


def load_reference(name: str) -> Callable[..., Any]:
    """The function that `"package.module:function"` names.

    Raises:
      ImportError: the module cannot be imported.
      ValueError: it has no such function.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"cannot import {module_name!r} for {name!r}: {error}; run from the folder "
            "that holds it, or install it"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = [n for n, v in vars(module).items() if callable(v)]
        raise ValueError(
            f"{module_name!r} has no function {attribute!r}; "
            f"{nearest(attribute, [n for n in found if not n.startswith('_')])}"
        )
    return function


def call_reference(name: str, **options: Any) -> Any:
    """Calls the function that `"package.module:function"` names, options checked.

    Raises:
      ImportError: the module cannot be imported.
      TypeError: an option that the function does not take, or of a wrong type.
      ValueError: the module has no such function, or an impossible value.
    """
    function = load_reference(name)
    check_options(function, options, f"{name!r}")
    return function(**options)


def check_options(
    factory: Callable[..., Any],
    options: dict[str, Any],
    owner: str,
    *,
    elsewhere: Collection[str] = (),
) -> None:
    """Checks keyword options against a function's signature and annotations.

    Args:
      factory: the function.
      options: what it would be called with.
      owner: what to call it in messages.
      elsewhere: parameters that get their values from elsewhere and are no options.

    Raises:
      TypeError: unknown option, missing option, or a value of a wrong type.
    """
    parameters = inspect.signature(factory).parameters
    known = {
        name: p
        for name, p in parameters.items()
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and name not in elsewhere
    }
    for name in options:
        if name not in known:
            raise TypeError(f"{owner} has no option {name!r}; {nearest(name, known)}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in options:
            raise TypeError(f"{owner} needs the option {name!r}")
    try:
        hints = typing.get_type_hints(factory)
    except (NameError, TypeError):
        # Annotations that only a static checker can read say nothing here.
        hints = {}
    for name, value in options.items():
        if name in hints and not matches(value, hints[name]):
            raise TypeError(
                f"{owner}: option {name!r} must be {describe(hints[name])}, "
                f"got {value!r}"
            )


def matches(value: Any, hint: Any) -> bool:
    """Whether a config value fits a type hint; an int is accepted for a float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(matches(v, args[0]) for v in value)
        return len(value) == len(args) and all(map(matches, value, args))
    if origin in (list, collections.abc.Sequence):
        return isinstance(value, tuple | list) and all(
            matches(v, args[0]) for v in value
        )
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, collections.abc.Mapping) and all(
            matches(k, args[0]) and matches(v, args[1]) for k, v in value.items()
        )
    if origin is collections.abc.Callable:
        return callable(value)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def describe(hint: Any) -> str:
    """A type hint in words for an error message."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(a) for a in args))
    if origin is collections.abc.Callable:
        return "a schedule"
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if hint is type(None) or hint is None:
        return "None"
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a tuple of {describe(args[0])}"
        return f"a tuple of {len(args)} values"
    if isinstance(hint, type) and origin is None:
        return {"int": "an integer", "float": "a number", "str": "a string"}.get(
            hint.__name__, hint.__name__
        )
    return str(hint).replace("typing.", "")
