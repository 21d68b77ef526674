"""From a plan to the objects of a run: data, networks, methods, mesh.

Everything that can be wrong is found here, before the first step: the shapes come from
abstract evaluation, so no array is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxkd import data, distill, models
from jaxkd.analysis.costs import Costs, network_costs
from jaxkd.data import Source
from jaxkd.distill.method import Method, compose
from jaxkd.training import optimizers, sharding
from jaxkd.training.network import Network, from_linen
from jaxkd.training.plan import NetworkPlan, Plan, StagePlan
from jaxkd.training.schema import ConfigError, at
from jaxkd.training.state import TrainState
from jaxkd.training.step import init_state
from jaxkd.training.workdir import import_tensorboard

# Metrics that can tell the best checkpoint: larger is better.
_SCORES = {
    "segmentation": ("dice", "iou"),
    "classification": ("accuracy", "macro_f1"),
}
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, ready to run.

    Attributes:
      name: its name in the config.
      plan: its plan.
      student: the network that learns.
      teachers: the networks it learns from.
      method: the losses.
      tx: the optimiser.
      schedule: its learning rate.
      steps_per_epoch: full batches per epoch.
      phase: how many earlier stages trained the same network.
    """

    name: str
    plan: StagePlan
    student: Network
    teachers: tuple[Network, ...]
    method: Method
    tx: optax.GradientTransformation
    schedule: optimizers.Schedule
    steps_per_epoch: int
    phase: int

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole stage."""
        return self.plan.epochs * self.steps_per_epoch

    def weights(self) -> dict[str, float | str]:
        """The weight of each term, `"schedule"` where it changes."""
        return {
            k: "schedule" if callable(w) else w for k, w in self.method.weights.items()
        }

    def init_state(
        self, key: jax.Array, variables: Mapping[str, Any] | None = None
    ) -> TrainState:
        """The state before the stage's first step (see `step.init_state`)."""
        return init_state(
            jax.random.fold_in(key, self.phase),
            student=self.student,
            method=self.method,
            teachers=self.teachers,
            tx=self.tx,
            ema=self.plan.ema,
            variables=None if variables is None else dict(variables),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """All objects of a run."""

    plan: Plan
    mesh: Mesh
    train: Source
    test: Source
    networks: Mapping[str, Network]
    stages: tuple[Stage, ...]
    costs: Mapping[str, Costs]

    @property
    def task(self) -> str:
        """`"classification"` or `"segmentation"`."""
        return self.train.info.task

    @property
    def metric(self) -> str:
        """The metric that tells the best checkpoint."""
        return self.plan.evaluation.metric or _SCORES[self.task][0]

    @property
    def eval_batch_size(self) -> int:
        """Records per evaluation batch, rounded up to the number of devices."""
        size = self.plan.evaluation.batch_size or self.plan.data.batch_size
        return -(-size // self.mesh.size) * self.mesh.size

    def key(self) -> jax.Array:
        """The run's random key."""
        return jax.random.key(self.plan.seed)


def make_setup(plan: Plan) -> Setup:
    """Builds and checks everything a plan names.

    Raises:
      ConfigError: one line that names the config key and what is wrong.
    """
    with at("config.mesh"):
        mesh = sharding.make_mesh(data=plan.mesh.data, fsdp=plan.mesh.fsdp)
    with at("config.log.tensorboard"):
        if plan.log.tensorboard:
            import_tensorboard()
    train, test = _load_data(plan)
    scores = _SCORES[train.info.task]
    if plan.evaluation.metric not in (None, *scores):
        raise ConfigError(
            f"config.evaluation.metric: no metric {plan.evaluation.metric!r} that "
            f"could tell the best checkpoint; take one of {', '.join(scores)}"
        )
    for stage in plan.stages.values():
        with at("config.data.batch_size"):
            sharding.check_batch_size(
                plan.data.batch_size, mesh, accumulate=stage.accumulate
            )
    steps_per_epoch = len(train) // plan.data.batch_size
    if not steps_per_epoch:
        raise ConfigError(
            f"config.data.batch_size: {plan.data.batch_size} is more than the "
            f"{len(train)} training records of {train.info.name!r}"
        )
    with at("config.data.augment"):
        input_shape = plan.data.augment.output_shape(train.info.image_shape)
        if train.info.task == "segmentation" and (
            plan.data.augment.mixup or plan.data.augment.cutmix
        ):
            raise ValueError(
                "mixup and cutmix need one label per image; leave them out for "
                "segmentation"
            )

    networks, costs = {}, {}
    for name, network_plan in plan.networks.items():
        with at(f"config.networks.{name}"):
            module = _module(network_plan, train.info.num_classes, plan.precision)
            networks[name] = from_linen(name, module, input_shape)
            costs[name] = network_costs(module, input_shape)
        _check_task(networks[name], train.info.task)

    stages, phases = [], dict.fromkeys(plan.networks, 0)
    for name, stage_plan in plan.stages.items():
        learner = plan.learner(name)
        stages.append(
            _stage(
                name,
                stage_plan,
                student=networks[learner],
                teachers=tuple(networks[t] for t in stage_plan.teachers),
                steps_per_epoch=steps_per_epoch,
                phase=phases[learner],
            )
        )
        phases[learner] += 1
    return Setup(
        plan=plan,
        mesh=mesh,
        train=train,
        test=test,
        networks=networks,
        stages=tuple(stages),
        costs=costs,
    )


def _load_data(plan: Plan) -> tuple[Source, Source]:
    with at("config.data"):
        train, test = (
            data.load(
                plan.data.source,
                split=split,
                path=plan.data.path,
                on_error=plan.data.on_error,
                **plan.data.options,
            )
            for split in ("train", "test")
        )
    for split, source in (("train", train), ("test", test)):
        if not len(source):
            raise ConfigError(f"config.data: the {split} split has no records")
    if train.info.class_names != test.info.class_names:
        raise ConfigError(
            f"config.data: classes disagree; train has {train.info.class_names}, "
            f"test has {test.info.class_names}"
        )
    shared = sorted(set(train.groups) & set(test.groups))
    if shared:
        raise ConfigError(
            f"config.data: {len(shared)} groups are in both splits, e.g. {shared[0]!r}"
        )
    return train, test


def _module(plan: NetworkPlan, num_classes: int, precision: str) -> Any:
    options = dict(plan.options)
    wanted = options.pop("num_classes", num_classes)
    if wanted != num_classes:
        raise ValueError(
            f"num_classes is {wanted} but the data have {num_classes} classes; "
            "leave num_classes out"
        )
    if "dtype" in options:
        raise ValueError("dtype is config.precision's matter; leave it out here")
    return models.create(
        plan.name, num_classes=num_classes, dtype=_DTYPES[precision], **options
    )


def _check_task(network: Network, task: str) -> None:
    dense = len(network.spec.logits) == 3
    if dense != (task == "segmentation"):
        kind = "segmentation" if dense else "classification"
        raise ConfigError(
            f"config.networks.{network.name}.name: a {kind} network, "
            f"but the data are for {task}"
        )


def _stage(
    name: str,
    plan: StagePlan,
    *,
    student: Network,
    teachers: tuple[Network, ...],
    steps_per_epoch: int,
    phase: int,
) -> Stage:
    path = f"config.stages.{name}"
    parts, weights = {}, {}
    for part, part_options in plan.method.items():
        with at(f"{path}.method.{part}"):
            options = dict(part_options)
            weight = options.pop("weight", 1.0)
            weights[part] = optimizers.loss_weight(
                weight, steps_per_epoch=steps_per_epoch
            )
            parts[part] = distill.create(options.pop("name", part), **options)
            needed = parts[part].num_teachers
            if len(teachers) < needed:
                raise ValueError(
                    f"needs {needed} teacher{'s' * (needed > 1)}, but "
                    f"{path}.teachers names {len(teachers)}"
                )
    method = compose(parts, weights)
    if len(teachers) > method.num_teachers:
        raise ConfigError(
            f"{path}.teachers: {[t.name for t in teachers]} given, but the method "
            f"reads {method.num_teachers}"
        )
    with at(f"{path}.optimizer"):
        schedule = optimizers.learning_rate(
            plan.optimizer, epochs=plan.epochs, steps_per_epoch=steps_per_epoch
        )
        tx = optimizers.optimizer(plan.optimizer, schedule)
    specs = tuple(t.spec for t in teachers)
    with at(f"{path}.method"):
        jax.eval_shape(lambda k: method.init(k, student.spec, specs), jax.random.key(0))
    return Stage(
        name=name,
        plan=plan,
        student=student,
        teachers=teachers,
        method=method,
        tx=tx,
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        phase=phase,
    )
