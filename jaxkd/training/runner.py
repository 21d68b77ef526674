"""One stage from where its checkpoints stand to its end."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from jaxkd.analysis.ceiling import matmul_ceiling
from jaxkd.training.assembly import Assembly, Known, assemble
from jaxkd.training.calls import calls_ahead, choose_steps, periods
from jaxkd.training.checkpoints import Checkpoints
from jaxkd.training.dispatch import Programs
from jaxkd.training.evaluation import Evaluation, Judged, NotFinite
from jaxkd.training.network import Network, Variables
from jaxkd.training.profiler import Profiler
from jaxkd.training.progress import Clock, Meter, TrainingFailed, teacher_share
from jaxkd.training.schema import ConfigError
from jaxkd.training.seeds import mean_of
from jaxkd.training.setup import Setup
from jaxkd.training.signals import Stopped, StopSignal
from jaxkd.training.stage import Stage
from jaxkd.training.state import TrainState
from jaxkd.training.target_files import load_targets
from jaxkd.training.workdir import MetricsWriter, Workdir

logger = logging.getLogger("jaxkd")


Results = list[dict[str, float]]


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
        # Of the last step's state, by network, if that is what is handed on.
        self._judged: dict[str, list[Judged]] = {}

    def run(
        self, known: Known, finished: list[str]
    ) -> tuple[dict[str, Variables], dict[str, Any], dict[str, Results]]:
        """Trains, evaluates, and hands on.

        Args:
          known: has the variables of the teachers that run, of the network to start
            from, and of the learners if they were trained before.
          finished: the stages before this one.

        Returns:
          The learners' variables, the stage's record, and the metrics of each learner
          for each seed.
        """
        setup, stage, plan = self.setup, self.stage, self.setup.plan

        with contextlib.ExitStack() as stack:
            # -------------------------------------------------- data, teachers, step
            targets = load_targets(setup, stage, self.workdir, known)
            if targets is not None:
                stack.callback(targets.files.close)
            assembly = assemble(setup, stage, known, targets=targets)
            stack.callback(assembly.close)

            # ----------------------------------------------------------- restore
            checkpoints = Checkpoints(
                self.workdir.checkpoints(stage.name), keep=plan.checkpoint.keep
            )
            stack.callback(checkpoints.close)
            latest = checkpoints.latest()
            if latest is None:
                state = assembly.begin(known)
                first_step, clock = 0, Clock()
            else:
                state, record = checkpoints.restore(
                    latest, assembly.abstract, assembly.iterator
                )
                self._check_data(record)
                first_step, clock = latest, Clock(**record["clock"])
                logger.info("%s: resumed at step %d", stage.name, first_step)
            self.writer.rewind(stage.name, first_step, finished=finished)

            # -------------------------------------------------------------- loop
            loop = _Loop(self, assembly, checkpoints, clock)
            state = loop.run(state, first_step)

            # ---------------------------------------------------------- hand on
            checkpoints.wait()
            if self.stop.received and jax.process_count() == 1:
                raise self.stopped(stage.total_steps)
            chosen = handed_on(stage, checkpoints)
            if chosen != stage.total_steps:
                state, _ = checkpoints.restore(chosen, assembly.abstract)
        final, metrics = stage.final_variables(state), {}
        for name, network in stage.members.items():
            judged = self._judged.pop(name, None)
            metrics[name] = (
                report(self.evaluation, network, final[name], self.workdir)
                if judged is None
                else tell(judged, self.workdir)
            )
        return final, self._record(assembly.programs, clock, chosen), metrics

    def _record(self, programs: Programs, clock: Clock, chosen: int) -> dict[str, Any]:
        stage, images = self.stage, self.setup.plan.images_per_step
        reports = {str(n): dataclasses.asdict(r) for n, r in programs.reports.items()}
        return {
            "name": stage.name,
            "learner": stage.learners[0],
            "learners": list(stage.learners),
            "teachers": [t.name for t in stage.teachers],
            "method": stage.weights(),
            "epochs": stage.plan.epochs,
            "steps": stage.total_steps,
            "handed_on_step": chosen,
            "seconds": clock.seconds,
            "images_per_second": clock.images_per_second(images),
            "programs": reports,
        }

    def evaluate(self, state: TrainState, step: int, epoch: int) -> float:
        """Evaluates between epochs, writes the records.

        Returns:
          The score; the mean of several learners' and seeds' scores.
        """
        setup, scores = self.setup, []
        final = self.stage.final_variables(state)
        ends = step == self.stage.total_steps and self.stage.plan.keep == "last"
        for name, network in self.stage.members.items():
            results, kept = [], []
            for variables in setup.seeds.each(final[name]):
                try:
                    if ends:
                        kept.append(self.evaluation.judge(network, variables))
                        results.append(kept[-1].metrics(surface=False))
                    else:
                        results.append(
                            self.evaluation.metrics(network, variables, surface=False)
                        )
                except NotFinite as error:
                    # Early batch-norm statistics may overflow and recover; the losses
                    # did not.
                    logger.warning("%s, step %d: %s", self.stage.name, step, error)
                    results.append({setup.metric: math.nan})
            if ends and len(kept) == len(results):
                self._judged[name] = kept
            record = {
                "kind": "eval",
                "stage": self.stage.name,
                "step": step,
                "epoch": epoch,
                "network": name,
                **mean_of(
                    [{k: r.get(k, math.nan) for k in results[0]} for r in results]
                ),
            }
            score = float(record[setup.metric])
            if setup.seeds.several:
                by_seed = [float(r[setup.metric]) for r in results]
                record[f"{setup.metric}_by_seed"] = by_seed
            self.writer.write(record)
            scores.append(score)
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

    def stopped(self, step: int) -> Stopped:
        """What is raised when the state is saved and the run ends here."""
        return Stopped(
            f"stopped by {self.stop.received or 'a signal'} in stage "
            f"{self.stage.name!r} after step {step} of {self.stage.total_steps}; "
            "saved, run the same command again to continue"
        )


def report(
    evaluation: Evaluation, network: Network, variables: Variables, workdir: Workdir
) -> Results:
    """The metrics of a network for each seed; the first one's predictions are kept."""
    each = evaluation.setup.seeds.each(variables)
    return tell((evaluation.judge(network, one) for one in each), workdir)


def tell(judged: Iterable[Judged], workdir: Workdir) -> Results:
    """The metrics of what was judged, seed by seed; the first predictions are kept."""
    results: Results = []
    for one in judged:
        if not results:
            workdir.add_predictions(one.predictions())
        results.append(one.metrics())
    return results


class _Loop:
    """The steps of a stage: dispatches, log points, evaluations and saves."""

    def __init__(
        self,
        runner: StageRunner,
        assembly: Assembly,
        checkpoints: Checkpoints,
        clock: Clock,
    ):
        self.runner, self.setup, self.stage = runner, runner.setup, runner.stage
        self.assembly, self.programs = assembly, assembly.programs
        self.checkpoints, self.clock = checkpoints, clock

    def run(self, state: TrainState, first_step: int) -> TrainState:
        """Trains from `first_step` to the end of the stage."""
        setup, stage = self.setup, self.stage
        total, per_epoch = stage.total_steps, stage.steps_per_epoch
        clock, several = self.clock, setup.plan.train.steps(per_epoch)
        meter = Meter(
            stage=stage.name,
            write=self.runner.writer.write,
            step=first_step,
            clock=clock,
            every_steps=setup.plan.log.every_steps,
            steps_per_epoch=per_epoch,
            images_per_step=setup.plan.images_per_step,
            teacher_share=teacher_share(setup, stage),
        )
        profiler = Profiler(
            stage.name,
            self.runner.workdir.profile(stage.name),
            steps=setup.plan.profile,
        )
        clock.start()

        bar = tqdm(
            total=total,
            initial=first_step,
            desc=stage.name,
            unit="step",
            disable=True if jax.process_index() else None,
        )
        step = first_step
        with bar, profiler:
            while step < total:
                wanted = min(several, self._next_stop(step) - step)
                steps = choose_steps(wanted, self.programs.reports)
                start = time.monotonic()
                items = self.assembly.items(steps, state)
                seconds = time.monotonic() - start
                args = self.assembly.arguments(state, items)
                if not self.programs.has(steps):
                    # Compilation and what still runs stay out of the throughput.
                    meter.settle(0)
                    self.programs.prepare(*args)
                    meter.flops_per_step = self.programs.flops_per_step
                    meter.ceiling = self._ceiling()
                    meter.restart()
                profiler.before(meter)
                state, metrics = self.programs.prepare(*args)(*args)
                meter.dispatched(steps, metrics, data_seconds=seconds)
                meter.settle(calls_ahead(steps))
                profiler.after(meter, steps)
                before, step = step, step + steps
                bar.set_postfix(meter.shown, refresh=False)
                bar.update(steps)

                # Every save stands after the steps are checked: a loss that is not
                # finite is never written over a good checkpoint.
                judged, saved = self._due(step)
                stopping = self._stopping(before, step)
                if not (judged or saved or stopping):
                    continue
                meter.drain()
                score = None
                if judged:
                    score = self.runner.evaluate(state, step, step // per_epoch)
                    meter.shown[setup.metric] = f"{score:.4f}"
                bar.set_postfix(meter.shown)
                clock.stop()
                record = {
                    "clock": dataclasses.asdict(clock),
                    "train_records": len(setup.train),
                }
                self.checkpoints.save(
                    step, state, self.assembly.iterator, record, score=score
                )
                meter.restart()
                if stopping and step < total:
                    self.checkpoints.wait()
                    raise self.runner.stopped(step)
        jax.block_until_ready(state)
        clock.stop()
        return state

    def _due(self, step: int) -> tuple[bool, bool]:
        """Whether the networks are judged after a step, and whether it is saved."""
        plan, per_epoch = self.setup.plan, self.stage.steps_per_epoch
        last, every = step == self.stage.total_steps, plan.evaluation.every_epochs
        judged = last or bool(every and step % (every * per_epoch) == 0)
        return judged, step % (plan.checkpoint.every_steps or per_epoch) == 0

    def _next_stop(self, step: int) -> int:
        """The first step after this one where the devices may not run on."""
        found = periods(self.setup.plan, self.stage.steps_per_epoch)
        following = [step - step % period + period for period in found]
        return min(*following, self.stage.total_steps)

    def _ceiling(self) -> float:
        """FLOP/s that all devices could reach by the measured ceiling of one."""
        one = matmul_ceiling(self.setup.plan.precision)
        # Simulated devices share the host's cores.
        return one * (1 if jax.default_backend() == "cpu" else self.setup.mesh.size)

    def _stopping(self, before: int, step: int) -> bool:
        """Whether any process was asked to stop."""
        received = self.runner.stop.received is not None
        if jax.process_count() == 1:
            return received
        every = self.setup.plan.log.every_steps
        if before // every == step // every:
            return False
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.asarray(received))))


def handed_on(stage: Stage, checkpoints: Checkpoints) -> int:
    """The checkpoint whose variables a stage hands on."""
    step = checkpoints.best() if stage.plan.keep == "best" else checkpoints.latest()
    if step is None:
        raise TrainingFailed(f"stage {stage.name!r} has no checkpoint")
    return step
