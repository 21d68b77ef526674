"""Composing methods: names, weights, keys and state stay apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.distill import (
    DataSpec,
    Inputs,
    Method,
    Progress,
    Specs,
    compose,
    no_state,
)
from jaxkd.distill.method import multiply, weight_at
from jaxkd.layers import NetworkSpec, Outputs

SPEC = NetworkSpec(name="n", logits=(3,), taps={})
DATA = DataSpec(records=2, num_classes=3, batch_size=2, steps_per_epoch=1, epochs=1)
SPECS = Specs(student=SPEC, teachers=(), data=DATA)
INPUTS = Inputs(
    student=Outputs(logits=jnp.zeros((2, 3)), taps={}),
    teachers=(),
    batch={},
    key=jax.random.key(1),
    progress=Progress(step=jnp.asarray(0), epoch=jnp.asarray(0), epochs=1),
)


def _method(terms, *, weights=None, teachers=0):
    def init(key, specs):
        return {"w": jax.random.normal(key, (2,))}, {"count": jnp.zeros(())}

    def run(params, memory, inputs):
        noise = jax.random.uniform(inputs.key, (2,))
        values = {k: noise + i for i, k in enumerate(terms)}
        return values, {"count": memory["count"] + 1}

    weights = weights or dict.fromkeys(terms, 1.0)
    return Method(init=init, terms=run, weights=weights, num_teachers=teachers)


def _run(method):
    params, memory = method.init(jax.random.key(0), SPECS)
    return params, *method.terms(params, memory, INPUTS)


def test_a_part_with_one_term_of_its_name_keeps_it_and_others_are_prefixed():
    method = compose({"ce": _method(["ce"]), "hlfd": _method(["flfd", "plfd"])})
    _, terms, _ = _run(method)
    assert list(terms) == ["ce", "hlfd/flfd", "hlfd/plfd"]
    assert terms.keys() == method.weights.keys()


def test_weights_multiply_down_the_composition():
    inner = compose({"a": _method(["x", "y"], weights={"x": 2.0, "y": 0.5})}, {"a": 3})
    outer = compose({"in": inner}, {"in": lambda step: 10.0 + step})
    values = {k: float(weight_at(w, jnp.asarray(1))) for k, w in outer.weights.items()}
    assert values == {"in/a/x": 66.0, "in/a/y": 16.5}


def test_parts_draw_different_numbers_and_keep_their_own_state():
    method = compose({"a": _method(["a"]), "b": _method(["b"])})
    params, terms, memory = _run(method)
    assert not np.allclose(params["a"]["w"], params["b"]["w"])
    assert not np.allclose(terms["a"], terms["b"])
    assert {k: float(m["count"]) for k, m in memory.items()} == {"a": 1.0, "b": 1.0}


def test_the_number_of_teachers_is_the_largest():
    parts = {"a": _method(["a"]), "b": _method(["b"], teachers=2)}
    assert compose(parts).num_teachers == 2


def test_nothing_to_compose_is_refused():
    with pytest.raises(ValueError, match="at least one part"):
        compose({})


def test_a_weight_for_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match=r"weights given for \['b'\].*\['a'\]"):
        compose({"a": _method(["a"])}, {"b": 1.0})


def test_a_method_that_returns_other_terms_than_it_weighs_is_refused():
    method = compose({"a": _method(["x"], weights={"y": 1.0})})
    with pytest.raises(
        ValueError, match=r"returned terms \['x'\].*weights for \['y'\]"
    ):
        _run(method)


def test_numbers_multiply_to_a_number_and_schedules_to_a_schedule():
    assert multiply(2.0, 3.0) == 6.0
    product = multiply(2.0, lambda step: step * 1.0)
    assert callable(product)
    assert float(product(jnp.asarray(4.0))) == 8.0


def test_no_state_is_empty():
    assert no_state(jax.random.key(0), SPECS) == ({}, {})
