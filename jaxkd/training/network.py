"""Networks as the loop sees them: functions of variables, never modules.

Any function that keeps the contract of `ApplyFn` can be a teacher or a student; Linen
modules are wrapped by `from_linen`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkd.layers import BatchNorm, NetworkSpec, Outputs, Partition

Variables = dict[str, Any]


@runtime_checkable
class ApplyFn(Protocol):
    """`apply(variables, images, *, train, key) -> (outputs, collections)`.

    `collections` are the variables other than `"params"`, updated when `train`.
    `key` is for dropout and the like; None in evaluation.
    """

    def __call__(
        self,
        variables: Variables,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None,
    ) -> tuple[Outputs, Variables]:
        """Runs the network."""
        ...


@runtime_checkable
class UpdateFn(Protocol):
    """`update(variables, gradients, *, key, step, steps_per_epoch, total_steps)`."""

    def __call__(self, variables: Variables, gradients: Any, **told: Any) -> Variables:
        """Returns the variables for the next step."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upkeep:
    """What a network wants done around every step of the optimiser.

    Attributes:
      masks: of the variables; bool arrays in the structure of the params, which of
        their numbers take part. Gradients and what the optimiser remembers are
        multiplied by them.
      update: the variables for the next step, given those that the optimiser made and
        the gradients of the effective parameters, before masks.
      terms: of the variables; further terms of the loss, `{name: scalar}`.
      weights: the factor of each term.
      facts: of the variables; numbers for the log, `{name: scalar}`.
      restart: `restart(key, variables)`: the variables anew where their parameters were
        taken from another network.
      finalise: `finalise(variables)`: those of `plain` when training is over; None if
        there is no such network.
      plain: the network without what is done to it while it learns.
    """

    masks: Callable[[Variables], Any]
    update: UpdateFn
    terms: Callable[[Variables], dict[str, jax.Array]]
    weights: Mapping[str, float]
    facts: Callable[[Variables], dict[str, jax.Array]]
    restart: Callable[[jax.Array, Variables], Variables]
    finalise: Callable[[Variables], Variables] | None = None
    plain: Network | None = None


@dataclasses.dataclass(frozen=True)
class Network:
    """A network: pure functions and what they return.

    Attributes:
      name: its name in the run.
      init: `init(key) -> variables`; its `"params"` are what is trained.
      apply: see `ApplyFn`.
      spec: shapes of its outputs.
      facts: further numbers for the summary, e.g. bytes sent by a split network.
      freeze_norms: returns an `apply` in which batch norms that have a parameter whose
        path matches one of the patterns use their stored statistics; None if the
        network cannot do that.
      partition: how its parameters are split over the mesh axis `model`; None if they
        cannot be.
      upkeep: what it wants done around every step while it learns.
    """

    name: str
    init: Callable[[jax.Array], Variables]
    apply: ApplyFn
    spec: NetworkSpec
    facts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    freeze_norms: Callable[[tuple[str, ...]], ApplyFn] | None = None
    partition: Partition | None = None
    upkeep: Upkeep | None = None


def from_linen(name: str, module: nn.Module, input_shape: Sequence[int]) -> Network:
    """Wraps a Linen module called as `module(images, train=...) -> Outputs`.

    Args:
      name: the network's name in the run.
      module: the module.
      input_shape: `(height, width, channels)` of the images.

    Returns:
      The network; its spec comes from abstract evaluation, no array is made.
    """

    def init(key: jax.Array) -> Variables:
        images = jnp.zeros((1, *input_shape), jnp.float32)
        return dict(module.init(key, images, train=False))

    def apply(
        variables: Variables,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None,
    ) -> tuple[Outputs, Variables]:
        collections = {k: v for k, v in variables.items() if k != "params"}
        rngs = None if key is None else {"dropout": key}
        if not train:
            outputs = module.apply(variables, images, train=False, rngs=rngs)
            return _outputs(outputs, name), collections
        outputs, updated = module.apply(
            variables, images, train=True, rngs=rngs, mutable=list(collections)
        )
        return _outputs(outputs, name), {**collections, **updated}

    def freeze_norms(patterns: tuple[str, ...]) -> ApplyFn:
        found: set[str] = set()

        def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__" or not isinstance(
                module, BatchNorm | nn.BatchNorm
            ):
                return call(*args, **kwargs)
            path = "/".join(module.path)
            names = (f"{path}/scale", f"{path}/bias")
            if not any(re.search(p, n) for p in patterns for n in names):
                return call(*args, **kwargs)
            found.add(path)
            if isinstance(module, nn.BatchNorm):
                if module.use_running_average is not None:
                    raise ValueError(
                        f"batch norm {path!r} of {name!r} has use_running_average in "
                        "its constructor; give it in the call, then it can be frozen"
                    )
                return call(*args, **{**kwargs, "use_running_average": True})
            return call(args[0] if args else kwargs["x"], False)

        def frozen(
            variables: Variables,
            images: jax.Array,
            *,
            train: bool,
            key: jax.Array | None,
        ) -> tuple[Outputs, Variables]:
            with nn.intercept_methods(interceptor):
                return apply(variables, images, train=train, key=key)

        images = jax.ShapeDtypeStruct((2, *input_shape), jnp.float32)
        variables = jax.eval_shape(init, jax.random.key(0))
        key = jax.eval_shape(jax.random.key, 0)
        jax.eval_shape(
            lambda v, x, k: frozen(v, x, train=True, key=k), variables, images, key
        )
        if not found:
            raise ValueError(f"no batch norm of {name!r} has frozen parameters")
        return frozen

    facts = getattr(module, "facts", None)
    partition = getattr(module, "partition", None)
    return Network(
        name,
        init,
        apply,
        spec_of(name, init, apply, input_shape),
        facts={} if facts is None else facts(tuple(input_shape)),
        freeze_norms=freeze_norms,
        partition=None if partition is None else partition(),
    )


def from_nnx(
    name: str, make: Callable[..., Any], input_shape: Sequence[int]
) -> Network:
    """Wraps an NNX module called as `module(images) -> Outputs`.

    The module is taken apart by `nnx.split`: its `Param`s are trained, its other
    variables (batch statistics) travel in the collection `"state"`, and its streams of
    random numbers start from the step's key. `train()` and `eval()` choose the mode,
    as is usual in NNX.

    Args:
      name: the network's name in the run.
      make: makes the module, given `nnx.Rngs`.
      input_shape: `(height, width, channels)` of the images.

    Raises:
      TypeError: `make` makes no NNX module, or one that returns no `Outputs`.
    """
    from flax import nnx

    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    if not isinstance(abstract, nnx.Module):
        raise TypeError(
            f"network {name!r} must be an nnx.Module, got {type(abstract).__name__}"
        )
    graph, *templates = nnx.split(abstract, nnx.Param, nnx.RngState, ...)
    param_paths, rng_paths, other_paths = (
        list(nnx.to_flat_state(t)) for t in templates
    )

    def flat(state: Any) -> Variables:
        return {
            "/".join(map(str, path)): variable[...]
            for path, variable in nnx.to_flat_state(state)
        }

    def init(key: jax.Array) -> Variables:
        _, params, _, others = nnx.split(
            make(nnx.Rngs(key)), nnx.Param, nnx.RngState, ...
        )
        return {"params": flat(params), "state": flat(others)}

    def filled(paths: Any, values: Variables) -> Any:
        return nnx.from_flat_state(
            [(p, v.replace(values["/".join(map(str, p))])) for p, v in paths]
        )

    def apply(
        variables: Variables,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None,
    ) -> tuple[Outputs, Variables]:
        key = jax.random.key(0) if key is None else key
        # Every stream gets numbers of its own.
        streams = [
            jax.random.fold_in(key, i) if isinstance(v, nnx.RngKey) else jnp.uint32(0)
            for i, (_, v) in enumerate(rng_paths)
        ]
        rngs = nnx.from_flat_state(
            [(p, v.replace(x)) for (p, v), x in zip(rng_paths, streams, strict=True)]
        )
        module = nnx.merge(
            graph,
            filled(param_paths, variables["params"]),
            rngs,
            filled(other_paths, variables["state"]),
        )
        module.train() if train else module.eval()
        outputs = _outputs(module(images), name)
        _, _, _, others = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return outputs, {"state": flat(others)}

    return Network(name, init, apply, spec_of(name, init, apply, input_shape))


def spec_of(
    name: str,
    init: Callable[[jax.Array], Variables],
    apply: ApplyFn,
    input_shape: Sequence[int],
) -> NetworkSpec:
    """The shapes that a network returns, by abstract evaluation.

    Raises:
      TypeError: it does not return `Outputs`.
    """
    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    variables = jax.eval_shape(init, jax.random.key(0))
    outputs, _ = jax.eval_shape(
        lambda v, x: apply(v, x, train=False, key=None), variables, images
    )
    return NetworkSpec.from_outputs(name, _outputs(outputs, name))


def _outputs(value: Any, name: str) -> Outputs:
    if not isinstance(value, Outputs):
        raise TypeError(
            f"network {name!r} must return jaxkd.layers.Outputs(logits, taps), "
            f"got {type(value).__name__}"
        )
    return value
