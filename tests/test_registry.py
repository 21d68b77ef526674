import collections.abc
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest

from jaxkd.registry import Registry, check_options, describe, matches, nearest


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry over a package with one module and one private module."""
    package = tmp_path / "sample_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from jaxkd.registry import Registry\n"
        "registry = Registry('fruit', 'sample_package')\n"
    )
    (package / "apples.py").write_text(
        "from sample_package import registry\n"
        "@registry.register()\n"
        "def apple(*, weight: float = 1.0, colour: str):\n"
        "    if weight <= 0:\n"
        "        raise ValueError(f'weight must be > 0, got {weight}')\n"
        "    return (weight, colour)\n"
        "@registry.register('malus', 'crab')\n"
        "def other():\n"
        "    return 'crab'\n"
    )
    (package / "_hidden.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("sample_package").registry
    for name in [m for m in sys.modules if m.startswith("sample_package")]:
        del sys.modules[name]


def test_modules_register_themselves_by_being_there(registry):
    assert registry.names() == ["apple", "crab", "malus"]


def test_create_calls_the_factory(registry):
    assert registry.create("apple", weight=2.0, colour="red") == (2.0, "red")
    assert registry.create("crab") == registry.create("malus") == "crab"


def test_unknown_name_suggests_the_nearest(registry):
    with pytest.raises(KeyError, match="no fruit 'aple'; did you mean 'apple'"):
        registry.create("aple")


def test_unknown_name_lists_all_when_none_is_near(registry):
    with pytest.raises(KeyError, match="known: apple, crab, malus"):
        registry.get("zzz")


def test_a_name_is_taken_once(registry):
    registry.names()
    with pytest.raises(ValueError, match="'apple' is registered by"):

        @registry.register("apple")
        def pear():
            return None


def test_values_are_checked_by_the_factory(registry):
    with pytest.raises(ValueError, match="weight must be > 0, got -1.0"):
        registry.create("apple", weight=-1.0, colour="red")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"colour": "red", "wieght": 1.0}, "no option 'wieght'; did you mean 'weight'"),
        ({"weight": 1.0}, "fruit 'apple' needs the option 'colour'"),
        ({"colour": 3}, "option 'colour' must be a string, got 3"),
        ({"colour": "red", "weight": "1"}, "'weight' must be a number, got '1'"),
        ({"colour": "red", "weight": True}, "'weight' must be a number, got True"),
    ],
)
def test_options_are_checked_against_the_signature(registry, options, message):
    with pytest.raises(TypeError, match=message):
        registry.create("apple", **options)


def test_an_empty_registry_says_so():
    empty = Registry("fruit", "json")
    with pytest.raises(KeyError, match="known: none"):
        empty.get("apple")


def test_options_may_be_positional_or_keyword():
    def factory(a: int, *, b: int = 2):
        return a + b

    check_options(factory, {"a": 1}, "factory")
    with pytest.raises(TypeError, match="needs the option 'a'"):
        check_options(factory, {"b": 1}, "factory")


@pytest.mark.parametrize(
    "value, hint",
    [
        (1, int),
        (1, float),
        (1.5, float),
        ("a", str),
        (True, bool),
        (None, int | None),
        (3, int | None),
        ("a", Literal["a", "b"]),
        ((1, 2), tuple[int, int]),
        ([1, 2], tuple[int, int]),
        ((1, 2, 3), tuple[int, ...]),
        ((), tuple[int, ...]),
        (["a"], Sequence[str]),
        ({"a": 1.0}, Mapping[str, float]),
        ({"a": 1}, dict[str, float]),
        (abs, Callable[[int], int]),
        (0.5, float | Callable[[int], int]),
        (object(), Any),
    ],
)
def test_values_that_fit(value, hint):
    assert matches(value, hint)


@pytest.mark.parametrize(
    "value, hint",
    [
        (True, int),
        (True, float),
        (1.0, int),
        ("1", float),
        (1, str),
        (1, bool),
        (None, int),
        ("x", int | None),
        ("c", Literal["a", "b"]),
        (True, Literal[1, 2]),
        ((1,), tuple[int, int]),
        ((1, "a"), tuple[int, ...]),
        (3, tuple[int, ...]),
        ("abc", Sequence[str]),
        ({"a": "b"}, Mapping[str, float]),
        ({1: 1.0}, dict[str, float]),
        (3, collections.abc.Callable[[int], int]),
    ],
)
def test_values_that_do_not_fit(value, hint):
    assert not matches(value, hint)


@pytest.mark.parametrize(
    "hint, text",
    [
        (int, "an integer"),
        (float, "a number"),
        (str, "a string"),
        (bool, "bool"),
        (int | None, "an integer or None"),
        (Literal["a", "b"], "one of 'a', 'b'"),
        (tuple[int, ...], "a tuple of an integer"),
        (tuple[int, int], "a tuple of 2 values"),
    ],
)
def test_types_are_put_in_words(hint, text):
    assert describe(hint) == text


def test_nearest_prefers_a_close_name_to_a_list():
    assert nearest("alfa", ["alpha", "beta"]) == "did you mean 'alpha'?"
    assert nearest("gamma_ray", ["x", "y"]) == "known: x, y"
