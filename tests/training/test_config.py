"""Config files, command-line changes, and what a mistake in them says."""

import pytest

from jaxkd.training import config as config_lib
from jaxkd.training.schema import ConfigError


def _write(tmp_path, text):
    path = tmp_path / "c.py"
    path.write_text(text)
    return str(path)


GOOD = """
from ml_collections import ConfigDict
def get_config(arg=""):
    return ConfigDict(dict(variant=arg, a=dict(b=1, c=(1, 2)), name="x"))
"""


def test_load_config_passes_the_variant_and_returns_plain_values(tmp_path):
    config = config_lib.load_config(_write(tmp_path, GOOD) + ":tiny")
    assert config == {"variant": "tiny", "a": {"b": 1, "c": (1, 2)}, "name": "x"}
    assert type(config["a"]) is dict


def test_missing_file_names_it_and_its_neighbours(tmp_path):
    _write(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=r"no file '.*d\.py'; .* has c\.py"):
        config_lib.load_config(str(tmp_path / "d.py"))


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        ("x = 1\n", "", "no function get_config"),
        ("def get_config():\n    return {}\n", "", "must return an"),
        ("def get_config():\n    return {}\n", ":v", "has no variants, got 'v'"),
        ("def get_config(arg):\n    return 1 / 0\n", "", r"c\.py, line 2: ZeroDiv"),
        ("def get_config(:\n", "", r"c\.py, line 1: "),
        ("import no_such_module\n", "", r"line 1: ModuleNotFoundError: No module"),
        (
            "def get_config(arg):\n    raise ValueError('no variant v;\\ntake w')\n",
            ":v",
            "--config: no variant v; take w$",
        ),
    ],
)
def test_faulty_config_files_give_one_line(tmp_path, text, spec, message):
    with pytest.raises(ConfigError, match=message) as error:
        config_lib.load_config(_write(tmp_path, text) + spec)
    assert "\n" not in str(error.value)


def test_a_config_that_is_not_python_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: 1")
    with pytest.raises(ConfigError, match="not a Python file"):
        config_lib.load_config(str(path))


def test_overrides_come_with_equals_or_as_the_next_argument():
    pairs = config_lib.parse_overrides(["--config.a.b=1=2", "--config.c", "-3"])
    assert pairs == [("a.b", "1=2"), ("c", "-3")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr=1"], "unknown argument '--lr=1'"),
        (["--config.a"], "no value"),
        (["--config.a", "--config.b=1"], "--config.a: no value"),
        (["stray"], "unknown argument 'stray'"),
    ],
)
def test_malformed_overrides_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        config_lib.parse_overrides(arguments)


def test_overrides_are_literals_except_where_text_stands():
    config = {"a": {"b": 1, "s": "x", "t": (1,)}, "p": None}
    changed = config_lib.apply_overrides(
        config,
        [("a.b", "2e-3"), ("a.s", "7"), ("a.t", "[3, 4]"), ("p", "/d"), ("n.m", "no")],
    )
    assert changed == {
        "a": {"b": 0.002, "s": "7", "t": (3, 4)},
        "p": "/d",
        "n": {"m": "no"},
    }
    assert config["a"]["b"] == 1 and "n" not in config


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("False", False), ("None", None), ("1.5", 1.5)]
)
def test_words_for_true_false_and_none(text, value):
    assert config_lib.parse_value(text) is value or (
        config_lib.parse_value(text) == value
    )


def test_a_group_is_not_replaced_by_a_value():
    with pytest.raises(ConfigError, match=r"config\.a: is a group with the keys b"):
        config_lib.apply_overrides({"a": {"b": 1}}, [("a", "3")])
    with pytest.raises(ConfigError, match=r"config\.a\.b is a value, not a group"):
        config_lib.apply_overrides({"a": {"b": 1}}, [("a.b.c", "3")])


def test_differences_name_changed_added_and_removed_keys():
    old = {"a": {"b": 1, "gone": 0}, "same": [1]}
    new = {"a": {"b": 2, "new": 3}, "same": [1]}
    assert config_lib.differences(old, new) == [
        "config.a.b: 1 -> 2",
        "config.a.gone: 0 -> (absent)",
        "config.a.new: (absent) -> 3",
    ]


def test_a_config_equals_itself_after_json():
    config = {"a": (1, 2), "b": {"c": None}}
    assert (
        config_lib.differences(config_lib.jsonable(config), config_lib.jsonable(config))
        == []
    )
    assert config_lib.jsonable(config) == {"a": [1, 2], "b": {"c": None}}
