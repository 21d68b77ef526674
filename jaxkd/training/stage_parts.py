"""The parts of a stage, made from its plan and checked against each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxkd import distill
from jaxkd.distill.custom import from_loss
from jaxkd.distill.method import DataSpec, Method, Specs, Weight, compose
from jaxkd.select import Selection
from jaxkd.training import optimizers
from jaxkd.training.exchanged import PerDevice
from jaxkd.training.network import Network, Variables
from jaxkd.training.paths import matching, path_name
from jaxkd.training.schema import ConfigError, at
from jaxkd.training.sections import StagePlan

# What makes an entry of the batch that some methods need.
_MAKERS = {
    "target": "config.data.regions, or config.data.augment.mixup or .cutmix",
    "unlabelled_image": "config.data.labelled_fraction and .unlabelled_batch_size",
}


def choose_exchange(
    path: str,
    plan: StagePlan,
    student: Network,
    method: Method,
    specs: Specs,
    selection: Selection | None,
    mesh: Mesh | None,
) -> PerDevice | None:
    """How devices exchange gradients, checked against the rest of the stage."""
    if plan.optimizer.exchange is None:
        return None
    if mesh is None:
        raise ValueError("an exchange of gradients needs the mesh of the devices")
    key = jax.random.key(0)
    params, memory = jax.eval_shape(lambda k: method.init(k, specs), key)
    # What these do needs all records of a batch, or all of their gradients.
    needs = {
        "a compressed network": student.upkeep is not None,
        "a selection of records": selection is not None,
        "a method that remembers": bool(jax.tree.leaves(memory)),
        "a method with optimisers of its own": bool(method.optimizers),
    }
    for what, needed in needs.items():
        if needed:
            raise ConfigError(
                f"{path}: devices see their own records, but {what} needs those of all "
                "devices; leave one of them out"
            )
    with at(path):
        made = optimizers.exchange(
            plan.optimizer,
            steps_per_epoch=specs.data.steps_per_epoch,
            devices=mesh.shape["data"],
        )
        if made is None:
            return None
        network = jax.eval_shape(student.init, key)["params"]
        jax.eval_shape(made.init, {"network": network, "method": params})
        return PerDevice(made, mesh)


def check_upkeep(student: Network, steps_per_epoch: int, epochs: int) -> None:
    """Traces what the student wants done after a step, which may not fit the stage.

    Raises:
      ValueError: from a compression whose steps do not fit.
    """
    upkeep = student.upkeep
    if upkeep is None:
        return

    def update(key: jax.Array) -> Variables:
        variables = student.init(key)
        return upkeep.update(
            variables,
            variables["params"],
            key=key,
            step=jnp.zeros((), jnp.int32),
            steps_per_epoch=steps_per_epoch,
            total_steps=steps_per_epoch * epochs,
        )

    jax.eval_shape(update, jax.random.key(0))


def choose_method(
    path: str,
    plan: StagePlan,
    num_students: int,
    teachers: tuple[Network, ...],
    entries: Collection[str],
    data: DataSpec,
) -> Method:
    """The weighted sum of a stage's parts, checked against who is there."""
    parts, weights = {}, {}
    for part, part_options in plan.method.items():
        with at(f"{path}.method.{part}"):
            parts[part], weights[part] = _part(part, part_options, data)
            needed = parts[part].num_teachers
            needed = 1 if needed == "many" else needed
            if len(teachers) < needed:
                raise ValueError(
                    f"needs {needed} teacher{'s' * (needed > 1)}, but "
                    f"{path}.teachers names {len(teachers)}"
                )
            students = parts[part].num_students
            if students == 1 and num_students > 1:
                raise ValueError(
                    f"trains one student, but {path}.learner names {num_students}; "
                    "take a method whose students learn together, such as 'dml', alone"
                )
            if students > 1 and students != num_students:
                raise ValueError(
                    f"needs {students} students that learn together, but "
                    f"{path}.learner names {num_students}"
                )
            for entry in parts[part].needs:
                if entry not in entries:
                    raise ValueError(
                        f"needs {entry!r} in every batch; set {_MAKERS.get(entry, '')}"
                    )
            missing = [v for v in parts[part].views if f"image_{v}" not in entries]
            if missing and parts[part].prepare is None:
                raise ValueError(
                    f"needs the view {missing[0]!r} of every image; set "
                    f"config.data.augment.{missing[0]}"
                )
    with at(f"{path}.method"):
        method = compose(parts, weights)
    if method.num_teachers != "many" and len(teachers) > method.num_teachers:
        raise ConfigError(
            f"{path}.teachers: {[t.name for t in teachers]} given, but the method "
            f"reads {method.num_teachers}"
        )
    return method


def _part(
    part: str, part_options: Mapping[str, Any], data: DataSpec
) -> tuple[Method, Weight]:
    """One part of a stage's method, and its weight."""
    options = dict(part_options)
    weight = optimizers.loss_weight(
        options.pop("weight", 1.0), steps_per_epoch=data.steps_per_epoch
    )
    for option, value in options.items():
        if isinstance(value, Mapping) and "schedule" in value:
            options[option] = optimizers.loss_weight(
                value, steps_per_epoch=data.steps_per_epoch
            )
    if "loss" in options:
        if "name" in options:
            raise ValueError("name and loss exclude each other; give one of them")
        return from_loss(part, **options), weight
    return distill.create(options.pop("name", part), **options), weight


def choose_frozen(
    path: str, plan: StagePlan, student: Network, source: Network | None
) -> Callable[[str], bool] | None:
    """Tells frozen parameters; checks patterns and the network to start from."""
    variables = jax.eval_shape(student.init, jax.random.key(0))
    names = [path_name(p) for p, _ in jax.tree.leaves_with_path(variables["params"])]
    for pattern in plan.freeze:
        if not any(re.search(pattern, name) for name in names):
            raise ConfigError(
                f"{path}.freeze: {pattern!r} matches no parameter of "
                f"{student.name!r}, e.g. {names[0]}"
            )
    if source is not None:
        given = jax.eval_shape(source.init, jax.random.key(0))
        taken = matching(variables["params"], given["params"])
        leaves = jax.tree.leaves(variables["params"])
        kernels = [n for n, x in zip(names, leaves, strict=True) if x.ndim > 1]
        if not any(taken[name] for name in kernels):
            raise ConfigError(
                f"{path}.start_from: no kernel of {source.name!r} has the path and "
                f"shape of one of {student.name!r}"
            )
    if not plan.freeze:
        return None
    patterns = [re.compile(pattern) for pattern in plan.freeze]

    def frozen(name: str) -> bool:
        return any(pattern.search(name) for pattern in patterns)

    return frozen
