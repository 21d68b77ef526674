"""Optimisers and schedules from plans, built from optax parts.

SGD and Adam add the weight decay to the gradient before the update rule, as the
PyTorch optimisers behind most published numbers do; AdamW and LAMB decouple it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxkd import exchange as exchanges
from jaxkd.exchange import Exchange
from jaxkd.registry import check_options
from jaxkd.training.paths import path_name
from jaxkd.training.sections import OptimizerPlan

Schedule = Callable[[Any], jax.Array]


def learning_rate(
    plan: OptimizerPlan, *, epochs: int, steps_per_epoch: int
) -> Schedule:
    """The learning rate as a function of the optimiser step (counted from 0).

    Cosine: `end + (peak - end) (1 + cos(pi t / T)) / 2` over the epochs after the
    warm-up. With granularity `"epoch"` the rate is constant within an epoch.
    """
    peak, end = plan.learning_rate, plan.end_learning_rate
    warmup = plan.warmup_epochs
    if warmup >= epochs:
        raise ValueError(f"warmup_epochs {warmup} must be below epochs {epochs}")
    if plan.milestones and plan.milestones[-1] >= epochs:
        raise ValueError(
            f"milestone {plan.milestones[-1]} is never reached in {epochs} epochs"
        )

    def schedule(step: jax.Array) -> jax.Array:
        epoch = jnp.asarray(step, jnp.float32) / steps_per_epoch
        progress_epoch = jnp.floor(epoch) if plan.granularity == "epoch" else epoch
        done = jnp.clip((progress_epoch - warmup) / (epochs - warmup), 0.0, 1.0)
        if plan.schedule == "cosine":
            rate = end + (peak - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        elif plan.schedule == "linear":
            rate = peak + (end - peak) * done
        elif plan.schedule == "multistep":
            milestones = jnp.asarray(plan.milestones, jnp.float32)
            drops = jnp.sum(jnp.floor(epoch) >= milestones)
            rate = peak * plan.factor ** drops.astype(jnp.float32)
        else:
            rate = jnp.asarray(peak)
        if warmup:
            # The first step already moves: (step + 1) / warm-up steps, capped at 1.
            ramp = (epoch + 1.0 / steps_per_epoch) / warmup
            rate = rate * jnp.minimum(ramp, 1.0)
        return rate.astype(jnp.float32)

    return schedule


def weight_schedule(
    *,
    schedule: Literal["linear", "cosine", "step"],
    start: float,
    end: float,
    epochs: float,
    delay_epochs: float = 0.0,
    steps_per_epoch: int,
) -> Schedule:
    """A loss weight that goes from `start` to `end` within `epochs`.

    Args:
      schedule: `linear`, `cosine` (half a period), or `step` (jumps at the end).
      start: weight until `delay_epochs`.
      end: weight from `delay_epochs + epochs` on.
      epochs: length of the change.
      delay_epochs: epochs before it begins.
      steps_per_epoch: optimiser steps per epoch.
    """
    if epochs <= 0:
        raise ValueError(f"epochs of a weight schedule must be > 0, got {epochs}")

    def value(step: jax.Array) -> jax.Array:
        epoch = jnp.asarray(step, jnp.float32) / steps_per_epoch
        done = jnp.clip((epoch - delay_epochs) / epochs, 0.0, 1.0)
        if schedule == "cosine":
            done = 0.5 * (1.0 - jnp.cos(jnp.pi * done))
        elif schedule == "step":
            done = jnp.floor(done)
        return (start + (end - start) * done).astype(jnp.float32)

    return value


def loss_weight(value: Any, *, steps_per_epoch: int) -> float | Schedule:
    """A weight from a config: a number, or the options of `weight_schedule`.

    Raises:
      TypeError: neither, or an unknown option.
      ValueError: an impossible option.
    """
    if isinstance(value, Mapping):
        options = {**value, "steps_per_epoch": steps_per_epoch}
        check_options(weight_schedule, options, "weight schedule")
        return weight_schedule(**options)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"weight must be a number or a schedule, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"weight must be finite and >= 0, got {value}")
    return float(value)


def exchange(
    plan: OptimizerPlan, *, steps_per_epoch: int, devices: int
) -> Exchange | None:
    """How devices exchange gradients; None if the compiler sums them.

    Args:
      plan: DGC takes momentum and `clip_norm` from it.
      steps_per_epoch: of the stage.
      devices: how many exchange.

    Raises:
      KeyError, TypeError, ValueError: an exchange or an option that cannot be.
    """
    if plan.exchange is None:
        return None
    options = dict(plan.exchange)
    name = options.pop("name")
    given: dict[str, Any] = {}
    if name == "dgc":
        given = {
            "momentum": plan.momentum,
            "nesterov": plan.nesterov,
            "clip_norm": plan.clip_norm,
            "steps_per_epoch": steps_per_epoch,
        }
    elif name == "quantized":
        given = {"devices": devices}
    for option in given:
        if option in options:
            raise ValueError(f"{option} is not set here: it comes from the stage")
    made = exchanges.create(name, **options, **given)
    if made.has_momentum and plan.name != "sgd":
        raise ValueError(
            f"{name!r} has the momentum of SGD in it, but the optimizer is "
            f"{plan.name!r}; take 'sgd', or the exchange 'powersgd' or 'quantized'"
        )
    return made


def decay_with_momentum(
    decay: optax.GradientTransformation, momentum: float, *, nesterov: bool
) -> optax.GradientTransformation:
    """A weight decay with momentum of its own, added to updates that have theirs.

    With the same momentum it is what SGD does to gradient and decay together.

    Args:
      decay: such as `optax.add_decayed_weights` makes.
      momentum: the factor.
      nesterov: the form.
    """
    trace = optax.trace(momentum, nesterov=nesterov)

    def init(params: Any) -> Any:
        return decay.init(params), trace.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        zeros = jax.tree.map(jnp.zeros_like, updates)
        decayed, first = decay.update(zeros, state[0], params)
        decayed, second = trace.update(decayed, state[1])
        return jax.tree.map(jnp.add, updates, decayed), (first, second)

    return optax.GradientTransformation(init, update)


def optimizer(
    plan: OptimizerPlan, schedule: Schedule, *, has_momentum: bool = False
) -> optax.GradientTransformation:
    """The optax transformation of a plan; `schedule` gives its learning rate.

    Args:
      plan: the plan.
      schedule: the learning rate.
      has_momentum: whether what it gets is clipped and has the momentum of SGD already.
    """
    parts: list[optax.GradientTransformation] = []
    if plan.clip_norm is not None and not has_momentum:
        parts.append(optax.clip_by_global_norm(plan.clip_norm))
    decay = optax.add_decayed_weights(
        plan.weight_decay,
        mask=_kernels if plan.weight_decay_mask == "kernels" else None,
    )
    coupled = plan.name in ("sgd", "adam")
    if plan.weight_decay and coupled:
        parts.append(
            decay_with_momentum(decay, plan.momentum, nesterov=plan.nesterov)
            if has_momentum
            else decay
        )
    if plan.name == "sgd":
        if plan.momentum and not has_momentum:
            parts.append(optax.trace(plan.momentum, nesterov=plan.nesterov))
    else:
        parts.append(optax.scale_by_adam(plan.beta1, plan.beta2, plan.epsilon))
    if plan.weight_decay and not coupled:
        parts.append(decay)
    if plan.name == "lamb":
        parts.append(optax.scale_by_trust_ratio())
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts)


def partitioned(
    tx: optax.GradientTransformation,
    own: Mapping[str, optax.GradientTransformation],
    frozen: Callable[[str], bool] | None = None,
) -> optax.GradientTransformation:
    """Gives parts of a method's params optimisers of their own, and freezes others.

    Args:
      tx: the optimiser of everything else.
      own: optimisers by the path of a part below `params["method"]`, such as
        `"meal_v2/discriminator"`.
      frozen: tells by its path below `params["network"]` what must not change.

    Returns:
      `tx` itself if there is nothing to part.
    """
    if not own and frozen is None:
        return tx

    def label(path: Sequence[Any], leaf: Any) -> str:
        del leaf
        kind, _, name = path_name(path).partition("/")
        if kind == "network":
            return "frozen" if frozen is not None and frozen(name) else "stage"
        for part in own:
            if name == part or name.startswith(f"{part}/"):
                return f"own:{part}"
        return "stage"

    parts: dict[Hashable, optax.GradientTransformation] = {
        "stage": tx,
        "frozen": optax.set_to_zero(),
    }
    parts |= {f"own:{part}": part_tx for part, part_tx in own.items()}
    return optax.partition(parts, lambda params: jax.tree.map_with_path(label, params))


def _kernels(params: Any) -> Any:
    """Marks parameters with two axes or more: kernels, not biases or norm scales."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)
