"""The one training loop: it runs the stages of a plan, and resumes them exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxkd.training.assembly import Known, abstract_state, untrained
from jaxkd.training.checkpoints import Checkpoints
from jaxkd.training.evaluation import Evaluation
from jaxkd.training.network import Variables
from jaxkd.training.networks import costs_of
from jaxkd.training.runner import (
    Results,
    StageRunner,
    handed_on,
    report,
)
from jaxkd.training.seeds import mean_of, spread_of
from jaxkd.training.setup import Setup
from jaxkd.training.signals import StopSignal
from jaxkd.training.stage import Stage
from jaxkd.training.workdir import MetricsWriter, Workdir, describe_device, versions


def run(
    setup: Setup,
    workdir: Workdir,
    *,
    command: str,
    stop: StopSignal,
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Runs all stages that are not finished yet.

    Args:
      setup: the objects of the run.
      workdir: its folder.
      command: for the summary.
      stop: read between steps.
      only: names of the stages to run; None for all.

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
    known = Known(setup, lambda name: load_variables(setup, workdir, name, finished))
    for name in _frozen(setup):
        if name not in summary["results"]:
            results = report(evaluation, setup.networks[name], known(name), workdir)
            _add_results(summary, {name: results})
    try:
        for stage in setup.stages:
            if stage.name in finished or (only is not None and stage.name not in only):
                continue
            runner = StageRunner(setup, stage, workdir, writer, evaluation, stop)
            trained, record, metrics = runner.run(known, finished)
            _add_sizes(summary, setup, trained)
            known.keep(trained)
            # A later stage may split what is kept, and nothing else may hold it whole.
            del trained
            finished.append(stage.name)
            summary["stages"].append(record)
            _add_results(summary, metrics)
            if stage is setup.stages[-1]:
                summary["status"] = "finished"
            workdir.write_summary(summary)
    finally:
        writer.close()
    return summary


def _add_sizes(
    summary: dict[str, Any], setup: Setup, trained: Mapping[str, Variables]
) -> None:
    """Adds what networks cost without what is masked; of several seeds the first."""
    augment = setup.plan.data.augment
    shape = augment.output_shape(setup.train.info.image_shape)
    for name, variables in trained.items():
        network = setup.networks[name]
        if network.upkeep is None:
            continue
        costs = costs_of(network, setup.seeds.each(variables)[0], shape)
        summary["costs"][name] |= {
            "density": costs.density,
            "effective_macs": costs.total("effective_macs"),
            "weight_bytes": costs.total("bytes"),
        }


def _add_results(summary: dict[str, Any], metrics: dict[str, Results]) -> None:
    """Adds the metrics of networks: means, and over several seeds their spread."""
    for name, results in metrics.items():
        summary["results"][name] = mean_of(results)
        if len(results) > 1:
            summary.setdefault("spread", {})[name] = spread_of(results)
            summary.setdefault("by_seed", {})[name] = list(results)


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
        results = report(evaluation, network, variables, workdir)
        _add_results(summary, {name: results})
    workdir.write_summary(summary)
    return summary


def new_summary(setup: Setup, command: str) -> dict[str, Any]:
    """A summary with nothing trained yet."""
    return {
        "status": "running",
        "command": command,
        "device": describe_device(),
        "seed": setup.seeds.seeds[0],
        "seeds": list(setup.seeds.seeds),
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
        return untrained(setup, network)
    stage = [s for s in setup.stages if network in s.learners and s.name in finished][
        -1
    ]
    checkpoints = Checkpoints(
        workdir.checkpoints(stage.name), keep=setup.plan.checkpoint.keep
    )
    try:
        abstract, _ = abstract_state(setup, stage)
        state = checkpoints.restore_part(
            handed_on(stage, checkpoints), abstract, _handed_on_part(stage)
        )
    finally:
        checkpoints.close()
    return stage.final_variables(state)[network]


def _handed_on_part(stage: Stage) -> Callable[[str], bool]:
    """Tells by its path in the state what a stage's final variables are made of."""
    parts = {"params", "collections"} if stage.plan.ema is None else {"average"}
    if stage.method.readout is not None:
        parts |= {"params", "memory"}
    return lambda path: path.partition("/")[0] in parts


def _frozen(setup: Setup) -> list[str]:
    """The networks that teach and that no stage trains."""
    return [name for name, plan in setup.plan.networks.items() if plan.frozen]
