"""Methods as values: a pair of pure functions, and how to compose them.

A `Method` says how a network learns: `init` builds what the method itself trains or
remembers (adapters, discriminators, memory banks), `terms` turns outputs into named,
unreduced losses. A method never knows the loop, and a loss never knows a model.
`weighted` composes methods; the train step multiplies each term by its weight and
reduces once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkd.layers import NetworkSpec, Outputs
from jaxkd.layers.outputs import Leaf

Batch = Mapping[str, jax.Array]
Params = Any
Memory = Any
Terms = dict[str, jax.Array]
Scheduled = float | Callable[[jax.Array], jax.Array | float]
Weight = Scheduled


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What a method may know about the data and the length of its stage.

    Attributes:
      records: training records; `batch["index"]` runs from 0 to `records - 1`.
      num_classes: classes of the labels.
      batch_size: records that the method sees at once, over all devices (with
        accumulated gradients, those of a micro-batch).
      steps_per_epoch: optimiser steps per epoch.
      epochs: epochs of the stage.
      read_labels: returns the class of every training record, int `[records]`; None
        if there is no single class per record.
    """

    records: int
    num_classes: int
    batch_size: int
    steps_per_epoch: int
    epochs: int
    read_labels: Callable[[], np.ndarray] | None = None

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The class of every training record, int32 `[records]`.

        Raises:
          ValueError: the records have no single class.
        """
        if self.read_labels is None:
            raise ValueError("the training records have no single class each")
        return np.asarray(self.read_labels(), np.int32)


@flax.struct.dataclass
class Progress:
    """Where a stage stands.

    Attributes:
      step: optimiser steps done, int32.
      epoch: `step // steps_per_epoch`, int32, counted from 0.
      epochs: epochs of the stage (a Python number).
    """

    step: Leaf
    epoch: Leaf
    epochs: int = flax.struct.field(pytree_node=False)

    def warmup(self, epochs: int) -> jax.Array | float:
        """`min((epoch + 1) / epochs, 1)`, float32; 1 for `epochs` 0."""
        if not epochs:
            return 1.0
        return jnp.minimum((self.epoch + 1) / epochs, 1.0).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Specs:
    """What a method's `init` is told.

    Attributes:
      student: shapes of the student's outputs.
      teachers: those of each teacher.
      data: the training data.
    """

    student: NetworkSpec
    teachers: tuple[NetworkSpec, ...]
    data: DataSpec

    @property
    def teacher(self) -> NetworkSpec:
        """The first teacher.

        Raises:
          ValueError: there is none.
        """
        if not self.teachers:
            raise ValueError("the method needs a teacher; the stage names none")
        return self.teachers[0]


@flax.struct.dataclass
class Inputs:
    """What a method's `terms` is given at each step.

    Attributes:
      student: the student's outputs, in training mode.
      teachers: the teachers' outputs, behind a stop-gradient.
      batch: `image`, `label`, `index` and what else the data have, e.g. `target`.
      key: a random key, fresh at every step.
      progress: where the stage stands.
    """

    student: Outputs
    teachers: tuple[Outputs, ...]
    batch: Batch
    key: Leaf
    progress: Progress

    @property
    def teacher(self) -> Outputs:
        """The first teacher's outputs."""
        return self.teachers[0]

    @property
    def labels(self) -> jax.Array:
        """Class indices int32 `[batch, ...]`, those of the records themselves."""
        return self.batch["label"]

    @property
    def targets(self) -> jax.Array:
        """Soft labels float32 `[batch, classes]` of mixed images, else `labels`."""
        return self.batch["target"] if "target" in self.batch else self.labels

    def at(self, value: Scheduled) -> jax.Array | float:
        """The present value of an option that may be a schedule."""
        return weight_at(value, self.progress.step)


@runtime_checkable
class InitFn(Protocol):
    """`init(key, specs) -> (params, memory)`.

    It runs under `jax.eval_shape` first: shape and tap errors are raised here, before
    any array exists.
    """

    def __call__(self, key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        """Returns what the method trains and what it remembers."""
        ...


@runtime_checkable
class TermsFn(Protocol):
    """`terms(params, memory, inputs) -> ({name: per-example loss}, memory)`.

    The values have shape `[batch]` or `[batch, height, width]`, float32, unweighted.
    """

    def __call__(
        self, params: Params, memory: Memory, inputs: Inputs
    ) -> tuple[Terms, Memory]:
        """Returns unreduced losses and the new memory."""
        ...


@runtime_checkable
class PrepareFn(Protocol):
    """`prepare(batch, key) -> batch`: adds what the method's views need."""

    def __call__(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Returns the batch with more entries."""
        ...


@runtime_checkable
class ReadoutFn(Protocol):
    """`readout(params, memory, student) -> logits`: what the student predicts."""

    def __call__(self, params: Params, memory: Memory, student: Outputs) -> jax.Array:
        """Returns logits in the shape of `student.logits`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A way to learn, in the manner of an optax transformation.

    Attributes:
      init: see `InitFn`.
      terms: see `TermsFn`.
      weights: factor of every term that `terms` returns; a float or a function of the
        step (an optax schedule).
      num_teachers: how many teachers the method reads: a number (0: none), or
        "many" for one or more. Extra teachers are an error when a plan is made.
      num_students: how many students learn together; the others are
        `student.peers`.
      views: names of further views of the batch. Every network also runs on
        `batch["image_" + view]`, and `terms` finds the result in
        `outputs.views[view]`.
      needs: entries of the batch that the data must have for this method, e.g.
        "unlabelled_image".
      prepare: makes those entries of the batch where the data do not have them; see
        `PrepareFn`.
      teacher_mode: "train" runs the teachers in training mode: batch norms use the
        statistics of the batch and dropout drops (their variables stay as they are);
        "eval" is usual.
      optimizers: optimisers of their own for parts of the method's params, by the
        part's top-level key; the rest is trained by the stage's optimiser. Gradients
        must already be those that each part is meant to follow.
      readout: for a method whose params take part in the prediction; see `ReadoutFn`.
      readout_path: keys that lead from the method's state to that of the part which
        predicts; `compose` fills them in.
    """

    init: InitFn
    terms: TermsFn
    weights: Mapping[str, Weight]
    num_teachers: int | Literal["many"] = 0
    num_students: int = 1
    views: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    prepare: PrepareFn | None = None
    teacher_mode: Literal["eval", "train"] = "eval"
    optimizers: Mapping[str, optax.GradientTransformation] = dataclasses.field(
        default_factory=dict
    )
    readout: ReadoutFn | None = None
    readout_path: tuple[str, ...] = ()


def no_state(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
    """The `init` of methods that train and remember nothing."""
    del key, specs
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

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        params, memory = {}, {}
        for i, (part, method) in enumerate(methods.items()):
            part_key = jax.random.fold_in(key, i)
            params[part], memory[part] = method.init(part_key, specs)
        return params, memory

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        values, new_memory = {}, {}
        for i, (part, method) in enumerate(methods.items()):
            part_inputs = dataclasses.replace(
                inputs, key=jax.random.fold_in(inputs.key, i)
            )
            part_terms, new_memory[part] = method.terms(
                params[part], memory[part], part_inputs
            )
            if part_terms.keys() != method.weights.keys():
                raise ValueError(
                    f"method {part!r} returned terms {sorted(part_terms)} but has "
                    f"weights for {sorted(method.weights)}"
                )
            for term, value in part_terms.items():
                values[term_name(part, term)] = value
        return values, new_memory

    def prepare(batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        prepared = dict(batch)
        for i, method in enumerate(methods.values()):
            if method.prepare is not None:
                prepared = method.prepare(prepared, jax.random.fold_in(key, i))
        return prepared

    readout, path = _only_readout(methods)
    all_weights = {
        term_name(part, term): multiply(weights.get(part, 1.0), weight)
        for part, method in methods.items()
        for term, weight in method.weights.items()
    }
    return Method(
        init=init,
        terms=terms,
        weights=all_weights,
        num_teachers=_most_teachers(methods),
        num_students=max(m.num_students for m in methods.values()),
        views=tuple(dict.fromkeys(v for m in methods.values() for v in m.views)),
        needs=tuple(dict.fromkeys(n for m in methods.values() for n in m.needs)),
        prepare=prepare if any(m.prepare for m in methods.values()) else None,
        teacher_mode=_teacher_mode(methods),
        optimizers={
            f"{part}/{key}": tx
            for part, method in methods.items()
            for key, tx in method.optimizers.items()
        },
        readout=readout,
        readout_path=path,
    )


def _most_teachers(methods: Mapping[str, Method]) -> int | Literal["many"]:
    most = 0
    for method in methods.values():
        if method.num_teachers == "many":
            return "many"
        most = max(most, method.num_teachers)
    return most


def _teacher_mode(methods: Mapping[str, Method]) -> Literal["eval", "train"]:
    modes = {n: m.teacher_mode for n, m in methods.items() if m.num_teachers != 0}
    if len(set(modes.values())) > 1:
        raise ValueError(
            f"parts disagree on the teachers' batch norms: {modes}; give them one mode"
        )
    return "train" if "train" in modes.values() else "eval"


def _only_readout(
    methods: Mapping[str, Method],
) -> tuple[ReadoutFn | None, tuple[str, ...]]:
    """The readout of the one part that has one, and the path to its state."""
    found = {name: m for name, m in methods.items() if m.readout is not None}
    if len(found) > 1:
        raise ValueError(f"more than one part predicts for the student: {list(found)}")
    for name, method in found.items():
        return method.readout, (name, *method.readout_path)
    return None, ()


def multiply(a: Weight, b: Weight) -> Weight:
    """The product of two weights, a schedule if either is one."""
    if not callable(a) and not callable(b):
        return a * b
    return lambda step: weight_at(a, step) * weight_at(b, step)


def weight_at(weight: Scheduled, step: jax.Array) -> jax.Array | float:
    """The value of a weight, or of any scheduled option, at `step`."""
    return weight(step) if callable(weight) else weight
