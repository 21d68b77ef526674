"""A stage, ready to run: who learns, from whom, by which method.

Everything that can be wrong with it is found here by abstract evaluation; no array is
made.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxkd.distill.method import DataSpec, Method, Specs
from jaxkd.select import Selection
from jaxkd.training import optimizers, wrappers
from jaxkd.training.exchanged import PerDevice
from jaxkd.training.network import Network, Variables
from jaxkd.training.paths import matching, path_name, started_from
from jaxkd.training.schema import ConfigError, at
from jaxkd.training.sections import StagePlan
from jaxkd.training.selecting import choose_selection
from jaxkd.training.stage_parts import (
    check_upkeep,
    choose_exchange,
    choose_frozen,
    choose_method,
)
from jaxkd.training.start import augmentation_key, final_variables, init_state
from jaxkd.training.state import TrainState
from jaxkd.training.step import Augments, StepFn, make_train_step
from jaxkd.training.stored import StoredTeachers, store_teachers

logger = logging.getLogger("jaxkd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, ready to run.

    Attributes:
      name: its name in the config.
      plan: its plan.
      learners: names of the networks that learn; usually one.
      student: the network that learns, or all of them joined (`wrappers.join`).
      members: each of them as it predicts after the stage.
      teachers: the networks it learns from.
      stored: how their answers are stored; None if they answer in every step.
      selection: what chooses the records of its steps; None takes all of them.
      scorer: the network by whose losses the selection ranks them, if it names one.
      method: the losses.
      tx: the optimiser.
      schedule: its learning rate.
      data: what the method is told of the data.
      phase: how many earlier stages trained the same network.
      frozen: tells by its path which parameters the stage does not change.
      exchange: how devices exchange gradients; None lets the compiler sum them.
    """

    name: str
    plan: StagePlan
    learners: tuple[str, ...]
    student: Network
    members: Mapping[str, Network]
    teachers: tuple[Network, ...]
    method: Method
    tx: optax.GradientTransformation
    schedule: optimizers.Schedule
    data: DataSpec
    phase: int
    frozen: Callable[[str], bool] | None = None
    stored: StoredTeachers | None = None
    selection: Selection | None = None
    scorer: Network | None = None
    exchange: PerDevice | None = None

    @property
    def live_teachers(self) -> tuple[Network, ...]:
        """The networks that run in every step beside the student.

        The teachers, unless their answers are stored; and last the scorer.
        """
        teachers = () if self.stored is not None else self.teachers
        return teachers if self.scorer is None else (*teachers, self.scorer)

    def with_live(self, networks: tuple[Network, ...]) -> Stage:
        """The stage with other networks in the places of `live_teachers`."""
        if not networks:
            return self
        if self.scorer is None:
            return dataclasses.replace(self, teachers=networks)
        return dataclasses.replace(self, teachers=networks[:-1], scorer=networks[-1])

    @property
    def steps_per_epoch(self) -> int:
        """Full batches per epoch."""
        return self.data.steps_per_epoch

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
            data=self.data,
            ema=self.plan.ema,
            variables=None if variables is None else dict(variables),
            selection=self.selection,
        )

    @property
    def starts(self) -> tuple[str, ...]:
        """The networks whose variables the stage's own begin with."""
        if self.phase:
            return self.learners
        return () if self.plan.start_from is None else (self.plan.start_from,)

    def begin(self, key: jax.Array, variables: Mapping[str, Variables]) -> TrainState:
        """The state before the first step, given what was trained before.

        Args:
          key: the run's key.
          variables: of the networks that `starts` names, at least.
        """
        own = {n: wrappers.without_readout(variables[n]) for n in self.starts}
        if self.phase:
            several = len(self.learners) > 1
            return self.init_state(
                key, wrappers.gather(own) if several else own[self.learners[0]]
            )
        state = self.init_state(key)
        if not own:
            return state
        ((name, source),) = own.items()
        taken = matching(state.variables(), source).values()
        logger.info(
            "%s: %d of %d arrays taken from %s", self.name, sum(taken), len(taken), name
        )
        variables = started_from(state.variables(), source)
        if self.student.upkeep is not None:
            variables = self.student.upkeep.restart(key, variables)
        return self.init_state(key, variables)

    def train_step(self, augmentation: Augments) -> StepFn:
        """The stage's step, to be compiled (see `step.make_train_step`)."""
        if self.stored is not None:
            augmentation = self.stored.augmentation(augmentation)
        return make_train_step(
            student=self.student.apply,
            teachers=[] if self.stored else [t.apply for t in self.teachers],
            method=self.method,
            tx=self.tx,
            schedule=self.schedule,
            augmentation=augmentation,
            num_classes=self.data.num_classes,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.plan.epochs,
            accumulate=self.plan.accumulate,
            ema=self.plan.ema,
            frozen=self.frozen,
            stored=None if self.stored is None else self.stored.outputs,
            upkeep=self.student.upkeep,
            selection=self.selection,
            scorer=None if self.scorer is None else self.scorer.apply,
            exchange=self.exchange,
        )

    def augmentation_key(self, key: jax.Array) -> jax.Array:
        """The key of the stage's augmentation, given the run's key."""
        targets = self.plan.targets
        if targets is not None and targets.seed is not None:
            return jax.random.key(targets.seed)
        return augmentation_key(jax.random.fold_in(key, self.phase))

    def final_variables(self, state: TrainState) -> dict[str, Variables]:
        """The variables that the stage hands on, by network."""
        variables = final_variables(state, self.method)
        if len(self.learners) == 1:
            return {self.learners[0]: variables}
        return {name: wrappers.member(variables, name) for name in self.learners}


def make_stage(
    name: str,
    plan: StagePlan,
    *,
    learners: Mapping[str, Network],
    teachers: tuple[Network, ...],
    source: Network | None,
    known: Mapping[str, Network] | None = None,
    data: DataSpec,
    entries: Collection[str],
    input_shape: Sequence[int],
    phase: int = 0,
    mesh: Mesh | None = None,
) -> Stage:
    """Makes a stage from its plan and checks that its parts fit.

    Args:
      name: the stage's name.
      plan: its plan.
      learners: the networks that learn.
      teachers: the networks they learn from.
      source: the network that the learner starts from, if any.
      known: the networks that a selection may name.
      data: the training data; `epochs` is the plan's matter.
      entries: what a batch holds beside `image`, `label` and `index`.
      input_shape: `(height, width, channels)` of the images.
      phase: how many earlier stages trained the learners.
      mesh: the devices, for an exchange of gradients.

    Raises:
      ConfigError: one line that names the config key and what is wrong.
    """
    path = f"config.stages.{name}"
    data = dataclasses.replace(
        data, epochs=plan.epochs, batch_size=data.batch_size // plan.accumulate
    )
    selection, scorer, data = choose_selection(
        f"{path}.select", plan, data, entries, known or {}, tuple(learners)
    )
    student = (
        next(iter(learners.values()))
        if len(learners) == 1
        else wrappers.join(list(learners.values()), input_shape)
    )
    method = choose_method(path, plan, len(learners), teachers, entries, data)
    frozen = choose_frozen(path, plan, student, source)
    if frozen is not None and plan.frozen_batch_norm == "eval":
        if student.freeze_norms is None:
            raise ConfigError(
                f"{path}.frozen_batch_norm: 'eval' needs a Linen network with the "
                f"images of all others, which {student.name!r} is not"
            )
        with at(f"{path}.frozen_batch_norm"):
            apply = student.freeze_norms(plan.freeze)
        student = dataclasses.replace(student, apply=apply)
    with at(f"{path}.optimizer"):
        schedule = optimizers.learning_rate(
            plan.optimizer, epochs=plan.epochs, steps_per_epoch=data.steps_per_epoch
        )
    specs = Specs(
        student=student.spec, teachers=tuple(t.spec for t in teachers), data=data
    )
    with at(path):
        check_upkeep(student, data.steps_per_epoch, plan.epochs)
    with at(f"{path}.method"):
        params, _ = jax.eval_shape(lambda k: method.init(k, specs), jax.random.key(0))
        names = [path_name(p) for p, _ in jax.tree.leaves_with_path(params)]
        for part in method.optimizers:
            if not any(f"{name}/".startswith(f"{part}/") for name in names):
                raise ValueError(
                    f"an optimiser is given for {part!r}, which has no params"
                )
    exchange = choose_exchange(
        f"{path}.optimizer.exchange", plan, student, method, specs, selection, mesh
    )
    with at(f"{path}.optimizer"):
        tx = optimizers.optimizer(
            plan.optimizer,
            schedule,
            has_momentum=exchange is not None and exchange.exchange.has_momentum,
        )
        tx = optimizers.partitioned(tx, method.optimizers, frozen)
    if exchange is not None:
        tx = exchange.optimizer(tx)
    stored = None
    if plan.targets is not None:
        stored = store_teachers(
            path,
            plan.targets,
            method=method,
            student=student,
            teachers=teachers,
            data=data,
            entries=entries,
            input_shape=input_shape,
        )
    return Stage(
        name=name,
        plan=plan,
        learners=tuple(learners),
        student=student,
        members={n: wrappers.with_readout(m, method) for n, m in learners.items()},
        teachers=teachers,
        method=method,
        tx=tx,
        schedule=schedule,
        data=data,
        phase=phase,
        frozen=frozen,
        stored=stored,
        selection=selection,
        scorer=scorer,
        exchange=exchange,
    )
