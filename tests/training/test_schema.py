"""Nested mappings become dataclasses, and every mistake names its key."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from jaxkd.training.schema import ConfigError, at, build, plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1.0
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"rate must be > 0, got {self.rate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Open:
    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    inner: Inner = dataclasses.field(default_factory=Inner)
    maybe: Inner | None = None
    parts: Mapping[str, Open] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()


def test_build_makes_nested_dataclasses_and_keeps_order():
    built = build(
        Outer,
        {
            "count": 3,
            "inner": {"rate": 2},
            "maybe": {"kind": "b"},
            "parts": {"z": {"name": "x", "width": 2}, "a": {"name": "y"}},
            "names": ["u", "v"],
        },
        "config",
    )
    assert built.inner == Inner(rate=2)
    assert built.maybe == Inner(kind="b")
    assert list(built.parts) == ["z", "a"]
    assert built.parts["z"] == Open(name="x", options={"width": 2})
    assert built.names == ("u", "v")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"count": 1, "iner": {}}, r"config\.iner: unknown key; did you mean 'inner'"),
        ({"inner": {}}, r"config\.count: missing; an integer needed"),
        ({"count": "3"}, r"config\.count: must be an integer, got '3'"),
        ({"count": True}, r"config\.count: must be an integer, got True"),
        ({"count": 1.5}, r"config\.count: must be an integer, got 1\.5"),
        ({"count": 1, "inner": 3}, r"config\.inner: must be .*Inner, got 3"),
        ({"count": 1, "inner": {"rate": 0}}, r"config\.inner: rate must be > 0, got 0"),
        ({"count": 1, "inner": {"rate": "x"}}, r"config\.inner\.rate: must be a numb"),
        ({"count": 1, "inner": {"kind": "c"}}, r"must be one of 'a', 'b', got 'c'"),
        ({"count": 1, "parts": {"p": {}}}, r"config\.parts\.p\.name: missing"),
        ({"count": 1, "parts": 1}, r"config\.parts: must be a group of keys"),
        ({"count": 1, "parts": {"p": 1}}, r"config\.parts\.p: must be"),
        ({"count": 1, "names": "uv"}, r"config\.names: must be a tuple of a string"),
        (5, r"config: must be a group of keys, got 5"),
    ],
)
def test_mistakes_name_the_key_the_value_and_the_remedy(config, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(Outer, config, "config")
    assert "\n" not in str(error.value)


def test_at_prefixes_errors_of_values_and_leaves_others():
    with pytest.raises(ConfigError, match=r"^config\.x: no tap 'e9'$"):
        with at("config.x"):
            raise KeyError("no tap 'e9'")
    with pytest.raises(ConfigError, match=r"^config\.x: two lines$"):
        with at("config.x"):
            raise ValueError("two\n  lines")
    with pytest.raises(ZeroDivisionError):
        with at("config.x"):
            _ = 1 / 0


def test_plain_makes_tuples_of_lists_all_the_way_down():
    assert plain({"a": [1, [2, {"b": [3]}]]}) == {"a": (1, (2, {"b": (3,)}))}
