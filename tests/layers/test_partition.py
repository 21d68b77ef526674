"""Rules that tell by its path how a parameter is split."""

import pytest

from jaxkd.layers import Partition
from jaxkd.layers.partition import joined

RULES = Partition(
    rules={
        r"block\d+/first/kernel": (None, "model"),
        r"first/kernel": ("model", None),
    },
    units={"heads": 4},
)


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("block1/first/kernel", (None, "model")),
        ("trunk/block12/first/kernel", (None, "model")),
        ("first/kernel", ("model", None)),
        ("other/first/kernel", ("model", None)),
        ("the_first/kernel", ()),
        ("first/kernel/scale", ()),
        ("first/bias", ()),
    ],
)
def test_the_first_rule_that_matches_to_the_end_counts(path, spec):
    assert RULES.spec(path) == spec


def test_joined_networks_keep_their_own_rules():
    both = joined({"a.b": RULES, "plain": None, "c": Partition(rules={}, units={})})
    assert both.units == {"heads of a.b": 4}
    assert both.spec("a.b/block1/first/kernel") == (None, "model")
    assert both.spec("a.b/trunk/first/kernel") == ("model", None)
    assert both.spec("plain/first/kernel") == ()
    assert both.spec("axb/first/kernel") == ()


def test_networks_without_rules_have_none_together():
    assert joined({"a": None, "b": None}) is None
