"""Compression as a value: how a network is made small while it learns.

A `Compression` is to a network what an optax transformation is to gradients: a few pure
functions that know neither the network nor the loop. It sees parameters by their paths
(`"stage1_block1/conv1/kernel"`), and works in two places:

* on the parameters: it says what the network computes with (`effective`), which of them
  take part (`masks`), and what changes after a step of the optimiser (`update`);
* on the layers: within `layers`, calls of convolutions, products and norms may compute
  something else (see `jaxkd.layers.rules`).

What it trains and what it remembers travel with the network's variables, so that they
are saved, resumed, averaged and handed on as these are. Factories register themselves
by being in one of the packages named below; a config chooses them by
`config.networks.<network>.compress`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp

from jaxkd.registry import Registry

Arrays = dict[str, jax.Array]
"""Arrays by their paths."""
State = Any

_REGISTRY = Registry("compression", "jaxkd.sparsity")

register = _REGISTRY.register
names = _REGISTRY.names


@flax.struct.dataclass
class After:
    """What an update is told once the optimiser has made its step.

    Attributes:
      params: the network's parameters after the step, by path.
      gradients: of the loss by the *effective* parameters, dense, by path.
      key: a random key, fresh at every step.
      step: the steps done before this one, int32.
      steps_per_epoch: of the stage.
      total_steps: of the stage.
    """

    params: Arrays
    gradients: Arrays
    key: Any
    step: Any
    steps_per_epoch: int = flax.struct.field(pytree_node=False)
    total_steps: int = flax.struct.field(pytree_node=False)


@runtime_checkable
class InitFn(Protocol):
    """`init(key, params) -> (learned, state)`.

    Runs under `jax.eval_shape` first; what cannot be compressed is an error here.
    """

    def __call__(self, key: jax.Array, params: Arrays) -> tuple[Arrays, State]:
        """Returns what is trained beside the network, and what is remembered."""
        ...


@runtime_checkable
class EffectiveFn(Protocol):
    """`effective(learned, state, params) -> params`."""

    def __call__(self, learned: Arrays, state: State, params: Arrays) -> Arrays:
        """Returns the parameters that the network computes with."""
        ...


@runtime_checkable
class MasksFn(Protocol):
    """`masks(state) -> {path: bool array}`, of the masked parameters alone."""

    def __call__(self, state: State) -> Arrays:
        """Returns which numbers take part."""
        ...


@runtime_checkable
class UpdateFn(Protocol):
    """`update(learned, state, after) -> (params, state)`."""

    def __call__(
        self, learned: Arrays, state: State, after: After
    ) -> tuple[Arrays, State]:
        """Returns the parameters and the state for the next step."""
        ...


@runtime_checkable
class FinaliseFn(Protocol):
    """`finalise(learned, state, params) -> params`, when training is over."""

    def __call__(self, learned: Arrays, state: State, params: Arrays) -> Arrays:
        """Returns what the network computes with when it is deployed."""
        ...


@runtime_checkable
class FitFn(Protocol):
    """`fit(init, logits, input_shape) -> Compression`."""

    def __call__(
        self,
        init: Callable[[jax.Array], Any],
        logits: Callable[[Any, jax.Array], jax.Array],
        input_shape: tuple[int, ...],
    ) -> Compression:
        """Returns the compression for a network with these variables and logits."""
        ...


@runtime_checkable
class TermsFn(Protocol):
    """`terms(learned, state, params) -> {name: scalar}`: further terms of the loss."""

    def __call__(self, learned: Arrays, state: State, params: Arrays) -> Arrays:
        """Returns float32 scalars, unweighted."""
        ...


def _keep(learned: Arrays, state: State, params: Arrays) -> Arrays:
    del learned, state
    return params


def _no_masks(state: State) -> Arrays:
    del state
    return {}


def _no_values(learned: Arrays, state: State, params: Arrays) -> Arrays:
    del learned, state, params
    return {}


def _same(learned: Arrays, state: State, after: After) -> tuple[Arrays, State]:
    del learned
    return after.params, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression:
    """A way to make a network small, in the manner of an optax transformation.

    Attributes:
      init: see `InitFn`.
      effective: see `EffectiveFn`. Gradients of the effective parameters become
        gradients of the parameters by its derivative; a mask should let them pass
        whole (see `masked`), because `masks` cuts them for the optimiser.
      masks: see `MasksFn`. After every step the parameters, what the optimiser
        remembers of them, and before it their gradients are multiplied by these.
      update: see `UpdateFn`.
      terms: see `TermsFn`.
      weights: the factor of each term.
      facts: numbers for the log, such as the density: `{name: scalar}` of the same
        arguments as `terms`.
      layers: `layers(train)` is the context in which the network is run; None if calls
        of layers stay as they are.
      finalise: see `FinaliseFn`; None if the effective parameters, masked, are what is
        deployed.
      fit: makes the compression for a network, where it must know more of that than its
        parameters; `logits(variables, images)` are those of the network as it is, in
        evaluation. The result takes the place of this one.
    """

    init: InitFn
    effective: EffectiveFn = _keep
    masks: MasksFn = _no_masks
    update: UpdateFn = _same
    terms: TermsFn = _no_values
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    facts: TermsFn = _no_values
    layers: Callable[[bool], contextlib.AbstractContextManager[Any]] | None = None
    finalise: FinaliseFn | None = None
    fit: FitFn | None = None

    def final(self, learned: Arrays, state: State, params: Arrays) -> Arrays:
        """The parameters that are deployed: `finalise`, or its default."""
        if self.finalise is not None:
            return self.finalise(learned, state, params)
        params = apply_masks(params, self.masks(state))
        return self.effective(learned, state, params)


def create(name: str, /, **options: Any) -> Compression:
    """Makes the compression `name`.

    Args:
      name: one of `names()`, or `"package.module:function"` for one of your own.
      **options: of its factory.

    Raises:
      KeyError: no such compression; the message gives the nearest one.
      TypeError: an option that it does not take, or of a wrong type.
      ValueError: an impossible value.
    """
    made = _REGISTRY.create(name, **options)
    if not isinstance(made, Compression):
        raise TypeError(
            f"{name!r} must return a jaxkd.compression.Compression, got "
            f"{type(made).__name__}"
        )
    return made


def chain(parts: Mapping[str, Compression]) -> Compression:
    """One compression that does what several do, in their order.

    The first sees the network's parameters, the next what the first makes of them; a
    parameter that several mask takes part where all of them let it. Terms and facts
    become `"part/name"`.

    Args:
      parts: by name; their learned parameters and states are kept under it.
    """

    def init(key: jax.Array, params: Arrays) -> tuple[Arrays, State]:
        learned, state = {}, {}
        for i, (name, part) in enumerate(parts.items()):
            own, state[name] = part.init(jax.random.fold_in(key, i), params)
            learned.update({f"{name}/{path}": x for path, x in own.items()})
            params = apply_masks(params, part.masks(state[name]))
        return learned, state

    def own(learned: Arrays, name: str) -> Arrays:
        start = f"{name}/"
        return {
            path.removeprefix(start): x
            for path, x in learned.items()
            if path.startswith(start)
        }

    def effective(learned: Arrays, state: State, params: Arrays) -> Arrays:
        for name, part in parts.items():
            params = part.effective(own(learned, name), state[name], params)
        return params

    def finalise(learned: Arrays, state: State, params: Arrays) -> Arrays:
        for name, part in parts.items():
            params = part.final(own(learned, name), state[name], params)
        return params

    def fit(init: Any, logits: Any, input_shape: tuple[int, ...]) -> Compression:
        return chain(
            {
                name: part if part.fit is None else part.fit(init, logits, input_shape)
                for name, part in parts.items()
            }
        )

    def masks(state: State) -> Arrays:
        found: Arrays = {}
        for name, part in parts.items():
            for path, mask in part.masks(state[name]).items():
                found[path] = found[path] & mask if path in found else mask
        return found

    def update(learned: Arrays, state: State, after: After) -> tuple[Arrays, State]:
        new = {}
        for i, (name, part) in enumerate(parts.items()):
            told = after.replace(key=jax.random.fold_in(after.key, i))  # type: ignore
            params, new[name] = part.update(own(learned, name), state[name], told)
            after = after.replace(params=params)  # type: ignore
        return after.params, new

    def named(kind: str) -> TermsFn:
        def values(learned: Arrays, state: State, params: Arrays) -> Arrays:
            return {
                f"{name}/{key}": value
                for name, part in parts.items()
                for key, value in getattr(part, kind)(
                    own(learned, name), state[name], params
                ).items()
            }

        return values

    makers = [part.layers for part in parts.values() if part.layers is not None]

    @contextlib.contextmanager
    def layers(train: bool) -> Any:
        with contextlib.ExitStack() as stack:
            for make in makers:
                stack.enter_context(make(train))
            yield

    return Compression(
        init=init,
        effective=effective,
        masks=masks,
        update=update,
        terms=named("terms"),
        weights={
            f"{name}/{key}": weight
            for name, part in parts.items()
            for key, weight in part.weights.items()
        },
        facts=named("facts"),
        layers=layers if makers else None,
        finalise=finalise,
        fit=fit if any(part.fit for part in parts.values()) else None,
    )


@jax.custom_vjp
def masked(x: jax.Array, mask: jax.Array) -> jax.Array:
    """`x` where the mask is set and 0 elsewhere; the gradient passes everywhere.

    Dynamic sparse training looks at the gradients of the numbers that take no part.
    """
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


masked.defvjp(lambda x, mask: (masked(x, mask), None), lambda _, g: (g, None))


def apply_masks(arrays: Arrays, masks: Arrays) -> Arrays:
    """The arrays, zero where they have a mask that is not set."""
    return {
        path: jnp.where(masks[path], x, jnp.zeros((), x.dtype)) if path in masks else x
        for path, x in arrays.items()
    }


def flatten(tree: Any) -> Arrays:
    """Arrays by path, `"block/conv/kernel"`, of a tree of dicts."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def unflatten(arrays: Arrays, like: Any) -> Any:
    """The tree with the structure of `like` and the arrays of `flatten`."""
    paths: Iterable[Sequence[Any]] = [p for p, _ in jax.tree.leaves_with_path(like)]
    leaves = [
        arrays[jax.tree_util.keystr(tuple(path), simple=True, separator="/")]
        for path in paths
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
