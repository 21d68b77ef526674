"""The one training loop: it runs the stages of a plan, and resumes them exactly."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from jaxkd.data import Source, pipeline
from jaxkd.training import sharding
from jaxkd.training.checkpoints import Checkpoints, abstract_like
from jaxkd.training.evaluation import Evaluation, NotFinite
from jaxkd.training.network import Variables
from jaxkd.training.progress import Clock, TrainingFailed, Window
from jaxkd.training.schema import ConfigError
from jaxkd.training.setup import Setup
from jaxkd.training.stage import Stage
from jaxkd.training.state import TrainState
from jaxkd.training.workdir import MetricsWriter, Workdir, describe_device, versions

logger = logging.getLogger("jaxkd")


class Stopped(Exception):
    """SIGTERM or SIGINT came and the state is saved; run again to continue."""


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a flag that the loop reads between steps.

    A second signal ends the process at once, by the handlers that were there before.
    """

    def __init__(self):
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: Any) -> None:
        del frame
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def run(
    setup: Setup, workdir: Workdir, *, command: str, stop: StopSignal
) -> dict[str, Any]:
    """Runs all stages that are not finished yet.

    Args:
      setup: the objects of the run.
      workdir: its folder.
      command: for the summary.
      stop: read between steps.

    Returns:
      The summary, as in `summary.json`.

    Raises:
      TrainingFailed: the loss is not finite.
      Stopped: a signal came; everything is saved.
    """
    summary = workdir.summary() or new_summary(setup, command)
    finished = [s["name"] for s in summary["stages"]]
    writer = MetricsWriter(workdir, tensorboard=setup.plan.log.tensorboard)
    evaluation = Evaluation(setup)
    variables: dict[str, Variables] = {}
    for name in _frozen(setup):
        variables[name] = load_variables(setup, workdir, name, finished)
        if name not in summary["results"]:
            summary["results"][name], arrays = evaluation.report(
                setup.networks[name], variables[name]
            )
            workdir.add_predictions(arrays)
    try:
        for stage in setup.stages:
            if stage.name in finished:
                continue
            for name in _needed(stage):
                if name not in variables:
                    variables[name] = load_variables(setup, workdir, name, finished)
            runner = StageRunner(setup, stage, workdir, writer, evaluation, stop)
            trained, record, metrics = runner.run(variables, finished)
            variables |= trained
            finished.append(stage.name)
            summary["stages"].append(record)
            summary["results"] |= metrics
            if stage is setup.stages[-1]:
                summary["status"] = "finished"
            workdir.write_summary(summary)
    finally:
        writer.close()
    return summary


def evaluate(setup: Setup, workdir: Workdir) -> dict[str, Any]:
    """Evaluates the networks of all finished stages again and updates the summary."""
    summary = workdir.summary()
    finished = [s["name"] for s in summary["stages"]]
    evaluation = Evaluation(setup)
    trained = [n for s in setup.stages if s.name in finished for n in s.learners]
    for name in dict.fromkeys([*_frozen(setup), *trained]):
        variables = load_variables(setup, workdir, name, finished)
        done = [s for s in setup.stages if name in s.learners and s.name in finished]
        # As it predicts after the last stage that is finished, not that is planned.
        network = done[-1].members[name] if done else setup.networks[name]
        summary["results"][name], arrays = evaluation.report(network, variables)
        workdir.add_predictions(arrays)
    workdir.write_summary(summary)
    return summary


def new_summary(setup: Setup, command: str) -> dict[str, Any]:
    """A summary with nothing trained yet."""
    return {
        "status": "running",
        "command": command,
        "device": describe_device(),
        "seed": setup.plan.seed,
        "task": setup.task,
        "data": {
            "source": setup.train.info.name,
            "train_records": len(setup.train),
            "test_records": len(setup.test),
            "skipped_files": [*setup.train.info.skipped, *setup.test.info.skipped],
        },
        "class_names": list(setup.train.info.class_names),
        "stages": [],
        "results": {},
        "costs": {
            k: dataclasses.asdict(v) | dict(setup.networks[k].facts)
            for k, v in setup.costs.items()
        },
        "versions": versions(),
        "notes": list(setup.plan.notes),
    }


def load_variables(
    setup: Setup, workdir: Workdir, network: str, finished: list[str]
) -> Variables:
    """The variables that the last finished stage of a network handed on.

    Those of a frozen network are what its `init` makes.
    """
    if setup.plan.networks[network].frozen:
        return jax.jit(
            setup.networks[network].init,
            out_shardings=sharding.replicated(setup.mesh),
            compiler_options=run_once(),
        )(setup.key())
    stage = [s for s in setup.stages if network in s.learners and s.name in finished][
        -1
    ]
    checkpoints = Checkpoints(
        workdir.checkpoints(stage.name), keep=setup.plan.checkpoint.keep
    )
    try:
        abstract, _ = abstract_state(setup, stage)
        state, _ = checkpoints.restore(_handed_on(stage, checkpoints), abstract)
    finally:
        checkpoints.close()
    return stage.final_variables(state)[network]


def abstract_state(setup: Setup, stage: Stage) -> tuple[TrainState, TrainState]:
    """Shapes of a stage's state with shardings, and the shardings alone."""
    shapes = jax.eval_shape(stage.init_state, setup.key())
    shardings = sharding.state_sharding(
        shapes, setup.mesh, min_size=setup.plan.mesh.fsdp_min_size
    )
    return abstract_like(shapes, shardings), shardings


def run_once() -> dict[str, int] | None:
    """Compiler options for a program that runs once.

    On the CPU, optimising the initialisation of a large network takes longer than
    everything it would save.
    """
    if jax.default_backend() == "cpu":
        return {"xla_backend_optimization_level": 0}
    return None


def _frozen(setup: Setup) -> list[str]:
    """The networks that teach and that no stage trains."""
    return [name for name, plan in setup.plan.networks.items() if plan.frozen]


def _needed(stage: Stage) -> list[str]:
    """The trained networks that a stage starts from."""
    return [*(t.name for t in stage.teachers), *stage.starts]


def train_batches(setup: Setup, stage: Stage) -> Any:
    """The batches of a stage, this process's part of each.

    With stored region labels a record fills several places of a batch; with unlabelled
    data each batch also has unlabelled images. Either way there are
    `stage.total_steps` batches, and a set that is used up begins anew.
    """
    data = setup.plan.data

    def batches(source: Source, size: int, *, seed: int) -> pipeline.TrainBatches:
        rounds = -(-stage.total_steps // (len(source) // size))
        return pipeline.train_batches(
            source,
            batch_size=size,
            seed=seed,
            epochs=rounds,
            workers=data.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    seed = setup.plan.seed
    crops = data.region_crops if data.regions is not None else 1
    labelled = batches(setup.train, data.batch_size // crops, seed=seed)
    if setup.unlabelled is None or data.unlabelled_batch_size is None:
        return labelled
    # Another seed: the two sets must not go round in step.
    other = batches(setup.unlabelled, data.unlabelled_batch_size, seed=seed + 1)
    return pipeline.WithUnlabelled(labelled, other, stage.total_steps)


def _handed_on(stage: Stage, checkpoints: Checkpoints) -> int:
    """The checkpoint whose variables a stage hands on."""
    step = checkpoints.best() if stage.plan.keep == "best" else checkpoints.latest()
    if step is None:
        raise TrainingFailed(f"stage {stage.name!r} has no checkpoint")
    return step


class StageRunner:
    """Runs one stage from where its checkpoints stand to its end."""

    def __init__(
        self,
        setup: Setup,
        stage: Stage,
        workdir: Workdir,
        writer: MetricsWriter,
        evaluation: Evaluation,
        stop: StopSignal,
    ):
        self.setup, self.stage, self.workdir = setup, stage, workdir
        self.writer, self.evaluation, self.stop = writer, evaluation, stop

    def run(
        self, variables: Mapping[str, Variables], finished: list[str]
    ) -> tuple[dict[str, Variables], dict[str, Any], dict[str, dict[str, float]]]:
        """Trains, evaluates, and hands on.

        Args:
          variables: of the teachers, of the network to start from, and of the
            learners if they were trained before.
          finished: the stages before this one.

        Returns:
          The learners' variables, the stage's record, and their metrics.
        """
        setup, stage, plan = self.setup, self.stage, self.setup.plan

        # ------------------------------------------------------------------ data
        iterator = iter(train_batches(setup, stage))

        # ------------------------------------------------------------- shardings
        abstract, shardings = abstract_state(setup, stage)
        replicated = sharding.replicated(setup.mesh)

        # ------------------------------------------------------------------ step
        step_fn = jax.jit(
            stage.train_step(setup.augmentation),
            donate_argnums=0,
            out_shardings=(shardings, replicated),
        )

        # --------------------------------------------------------------- restore
        checkpoints = Checkpoints(
            self.workdir.checkpoints(stage.name), keep=plan.checkpoint.keep
        )
        try:
            latest = checkpoints.latest()
            if latest is None:
                state = jax.jit(
                    stage.begin,
                    out_shardings=shardings,
                    compiler_options=run_once(),
                )(setup.key(), {name: variables[name] for name in stage.starts})
                first_step, clock = 0, Clock()
            else:
                state, record = checkpoints.restore(latest, abstract, iterator)
                self._check_data(record)
                first_step, clock = latest, Clock(**record["clock"])
                logger.info("%s: resumed at step %d", stage.name, first_step)
            self.writer.rewind(stage.name, first_step, finished=finished)

            # -------------------------------------------------------------- loop
            teachers = tuple(variables[t.name] for t in stage.teachers)
            state = self._loop(
                step_fn, state, iterator, teachers, first_step, clock, checkpoints
            )

            # ---------------------------------------------------------- hand on
            checkpoints.wait()
            if self.stop.received and jax.process_count() == 1:
                raise self._stopped(stage.total_steps)
            chosen = _handed_on(stage, checkpoints)
            if chosen != int(state.step):
                state, _ = checkpoints.restore(chosen, abstract)
        finally:
            checkpoints.close()
            iterator.close()
        final, metrics = stage.final_variables(state), {}
        for name, network in stage.members.items():
            metrics[name], arrays = self.evaluation.report(network, final[name])
            self.workdir.add_predictions(arrays)
        record = {
            "name": stage.name,
            "learner": stage.learners[0],
            "learners": list(stage.learners),
            "teachers": [t.name for t in stage.teachers],
            "method": stage.weights(),
            "epochs": stage.plan.epochs,
            "steps": stage.total_steps,
            "handed_on_step": chosen,
            "seconds": clock.seconds,
            "images_per_second": clock.images_per_second(plan.data.batch_size),
        }
        return final, record, metrics

    def _loop(
        self,
        step_fn: Any,
        state: TrainState,
        iterator: Any,
        teachers: tuple[Variables, ...],
        first_step: int,
        clock: Clock,
        checkpoints: Checkpoints,
    ) -> TrainState:
        setup, stage, plan = self.setup, self.stage, self.setup.plan
        total, per_epoch = stage.total_steps, stage.steps_per_epoch
        window = Window(setup, stage, self.writer, step=first_step, clock=clock)
        clock.start()

        bar = tqdm(
            total=total,
            initial=first_step,
            desc=stage.name,
            unit="step",
            disable=True if jax.process_index() else None,
        )
        with bar:
            for step in range(first_step + 1, total + 1):
                fetch_start = time.monotonic()
                batch = sharding.put_batch(next(iterator), setup.mesh)
                window.data_seconds += time.monotonic() - fetch_start
                state, metrics = step_fn(state, batch, teachers)
                if step == first_step + 1:
                    # The first step compiles; waiting keeps it out of the throughput.
                    jax.block_until_ready(metrics)
                window.add(metrics, timed=step != first_step + 1)
                bar.update()

                last = step == total
                epoch_done = step % per_epoch == 0
                epoch = step // per_epoch
                every = plan.evaluation.every_epochs
                judged = last or (epoch_done and every and epoch % every == 0)
                if judged or step % plan.log.every_steps == 0:
                    bar.set_postfix(window.flush(step))

                # Every save stands after a flush: a loss that is not finite is
                # never written over a good checkpoint.
                score = None
                if judged:
                    score = self._evaluate(state, step, epoch)
                    window.shown[setup.metric] = f"{score:.4f}"
                    bar.set_postfix(window.shown)
                    window.restart()
                save_every = plan.checkpoint.every_steps or per_epoch
                stopping = self._stopping(step)
                if judged or stopping or step % save_every == 0:
                    window.flush(step)
                    clock.stop()
                    record = {
                        "clock": dataclasses.asdict(clock),
                        "train_records": len(setup.train),
                    }
                    checkpoints.save(step, state, iterator, record, score=score)
                    window.restart()
                if stopping and not last:
                    checkpoints.wait()
                    raise self._stopped(step)
        jax.block_until_ready(state)
        clock.stop()
        return state

    def _evaluate(self, state: TrainState, step: int, epoch: int) -> float:
        """Evaluates between epochs, writes the records.

        Returns:
          The score; the mean of several learners' scores.
        """
        final, scores = self.stage.final_variables(state), []
        for name, network in self.stage.members.items():
            try:
                metrics = self.evaluation.metrics(network, final[name], surface=False)
            except NotFinite as error:
                # Early batch-norm statistics may overflow and recover; the losses did
                # not.
                logger.warning("%s, step %d: %s", self.stage.name, step, error)
                metrics = {self.setup.metric: math.nan}
            self.writer.write(
                {
                    "kind": "eval",
                    "stage": self.stage.name,
                    "step": step,
                    "epoch": epoch,
                    "network": name,
                    **metrics,
                }
            )
            scores.append(float(metrics[self.setup.metric]))
        return sum(scores) / len(scores)

    def _check_data(self, record: Mapping[str, Any]) -> None:
        """Checks that a run goes on with as many records as it began with."""
        before, now = record["train_records"], len(self.setup.train)
        if before != now:
            raise ConfigError(
                f"config.data: stage {self.stage.name!r} began with {before} training "
                f"records and there are {now} now; restore the data or take another "
                "--workdir"
            )

    def _stopped(self, step: int) -> Stopped:
        return Stopped(
            f"stopped by {self.stop.received or 'a signal'} in stage "
            f"{self.stage.name!r} after step {step} of {self.stage.total_steps}; "
            "saved, run the same command again to continue"
        )

    def _stopping(self, step: int) -> bool:
        """Whether any process was asked to stop."""
        received = self.stop.received is not None
        if jax.process_count() == 1:
            return received
        if step % self.setup.plan.log.every_steps:
            return False
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.asarray(received))))
