"""Methods as values: a pair of pure functions, and how to compose them.

A `Method` says how a network learns: `init` builds what the method itself trains or
remembers (adapters, discriminators, memory banks), `terms` turns outputs into named,
unreduced losses. A method never knows the loop, and a loss never knows a model.
`weighted` composes methods; the train step multiplies each term by its weight and
reduces once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from jaxkd.layers import NetworkSpec, Outputs

Batch = Mapping[str, jax.Array]
Params = Any
Memory = Any
Terms = dict[str, jax.Array]
Weight = float | Callable[[jax.Array], jax.Array | float]


@runtime_checkable
class InitFn(Protocol):
    """`init(key, student, teachers) -> (params, memory)`; runs under `jax.eval_shape`.

    Shape and tap errors are raised here, before any array exists.
    """

    def __call__(
        self, key: jax.Array, student: NetworkSpec, teachers: tuple[NetworkSpec, ...]
    ) -> tuple[Params, Memory]:
        """Returns what the method trains and what it remembers."""
        ...


@runtime_checkable
class TermsFn(Protocol):
    """`terms(...) -> ({name: per-example loss}, memory)`.

    The values have shape `[batch]` or `[batch, height, width]`, float32, unweighted.
    `teachers` are already behind a stop-gradient. `key` is fresh at every step.
    """

    def __call__(
        self,
        params: Params,
        memory: Memory,
        student: Outputs,
        teachers: tuple[Outputs, ...],
        batch: Batch,
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[Terms, Memory]:
        """Returns unreduced losses and the new memory."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A way to learn, in the manner of an optax transformation.

    Attributes:
      init: see `InitFn`.
      terms: see `TermsFn`.
      weights: factor of every term that `terms` returns; a float or a function of the
        step (an optax schedule).
      num_teachers: how many teachers the method reads (0: none; extra teachers are
        an error when a plan is made).
    """

    init: InitFn
    terms: TermsFn
    weights: Mapping[str, Weight]
    num_teachers: int = 0


def no_state(
    key: jax.Array, student: NetworkSpec, teachers: tuple[NetworkSpec, ...]
) -> tuple[Params, Memory]:
    """The `init` of methods that train and remember nothing."""
    del key, student, teachers
    return {}, {}


def compose(
    methods: Mapping[str, Method], weights: Mapping[str, Weight] | None = None
) -> Method:
    """Composes named methods into one.

    The terms of a method that has one term of the same name keep that name
    (`"kd"`); others become `"name/term"` (`"hlfd/flfd"`). Weights multiply.

    Args:
      methods: the parts by name.
      weights: factor per part, default 1; a float or a schedule of the step.

    Returns:
      A method whose params and memory are dicts keyed by part.

    Raises:
      ValueError: no methods, or a weight for an unknown part.
    """
    if not methods:
        raise ValueError("a method needs at least one part, e.g. {'ce': 1.0}")
    weights = dict(weights or {})
    unknown = sorted(set(weights) - set(methods))
    if unknown:
        raise ValueError(
            f"weights given for {unknown} but the parts are {sorted(methods)}"
        )

    def term_name(part: str, term: str) -> str:
        if term == part and len(methods[part].weights) == 1:
            return part
        return f"{part}/{term}"

    def init(
        key: jax.Array, student: NetworkSpec, teachers: tuple[NetworkSpec, ...]
    ) -> tuple[Params, Memory]:
        params, memory = {}, {}
        for i, (part, method) in enumerate(methods.items()):
            part_key = jax.random.fold_in(key, i)
            params[part], memory[part] = method.init(part_key, student, teachers)
        return params, memory

    def terms(
        params: Params,
        memory: Memory,
        student: Outputs,
        teachers: tuple[Outputs, ...],
        batch: Batch,
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[Terms, Memory]:
        values, new_memory = {}, {}
        for i, (part, method) in enumerate(methods.items()):
            part_key = jax.random.fold_in(key, i)
            part_terms, new_memory[part] = method.terms(
                params[part], memory[part], student, teachers, batch, part_key, step
            )
            if part_terms.keys() != method.weights.keys():
                raise ValueError(
                    f"method {part!r} returned terms {sorted(part_terms)} but has "
                    f"weights for {sorted(method.weights)}"
                )
            for term, value in part_terms.items():
                values[term_name(part, term)] = value
        return values, new_memory

    all_weights = {
        term_name(part, term): multiply(weights.get(part, 1.0), weight)
        for part, method in methods.items()
        for term, weight in method.weights.items()
    }
    return Method(
        init=init,
        terms=terms,
        weights=all_weights,
        num_teachers=max(m.num_teachers for m in methods.values()),
    )


def multiply(a: Weight, b: Weight) -> Weight:
    """The product of two weights, a schedule if either is one."""
    if not callable(a) and not callable(b):
        return a * b
    return lambda step: weight_at(a, step) * weight_at(b, step)


def weight_at(weight: Weight, step: jax.Array) -> jax.Array | float:
    """The value of a weight at `step`."""
    return weight(step) if callable(weight) else weight
