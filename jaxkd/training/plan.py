"""The plan of a run: what a config says, as frozen dataclasses that check themselves.

Nothing below `main` ever sees a ConfigDict. These classes and those of
`jaxkd.training.sections` check what can be known without data or networks;
`jaxkd.training.setup` builds the objects and checks the rest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from jaxkd.data.augment import Augmentation
from jaxkd.registry import nearest
from jaxkd.training.schema import ConfigError, build
from jaxkd.training.sections import (
    CheckpointPlan,
    EvaluationPlan,
    LogPlan,
    MeshPlan,
    StagePlan,
    TrainPlan,
    not_negative,
    positive,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputPlan:
    """What one network wants its images to be, if not what the others get.

    Attributes:
      mean: subtracted from each channel, instead of `data.augment.mean`.
      std: divides each channel after `mean`.
      image_size: `(height, width)` to which images are resized (bilinear, half-pixel
        centres, without antialiasing).
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int] | None = None

    def __post_init__(self):
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std must be given together")
        if self.mean is not None and self.std is not None:
            if len(self.mean) != len(self.std) or not self.mean:
                raise ValueError(
                    f"mean has {len(self.mean)} values and std {len(self.std)}; give "
                    "one per channel to both"
                )
            if not all(0 < s < math.inf for s in self.std):
                raise ValueError(f"std must be > 0, got {self.std}")
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(f"image_size must be >= 1, got {self.image_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """A network by the name of its family, with its options (`width_factor`, ...).

    Attributes:
      name: a network of `jaxkd.models`, or `"package.module:function"`, a function
        that takes `num_classes` and the options and returns a module or a `Network`.
      input: how its images differ from those of the other networks.
      frozen: it teaches as its `init` makes it, and no stage trains it.
      compress: what makes it small while it learns, in this order: parts by name with
        their options, see `jaxkd.compression`.
      options: of the family.
    """

    name: str
    input: InputPlan | None = None
    frozen: bool = False
    compress: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPlan:
    """Where records come from and how they are batched.

    Attributes:
      source: name of a data source.
      path: its file or folder, if it has one.
      batch_size: records per optimiser step, over all devices and processes.
      workers: processes that read and decode; 0 reads in threads.
      on_error: what a damaged file does: `"raise"`, or `"skip"` and count.
      augment: what happens to a batch on the device.
      labelled_fraction: share of the training groups whose labels are used; the other
        records are the unlabelled set of semi-supervised methods.
      unlabelled_batch_size: unlabelled records per step, an even number.
      regions: file of stored region labels (see `jaxkd.data.regions`); every record
        then gives `region_crops` of its stored crops to a batch.
      region_crops: crops per record; `batch_size` counts crops.
      options: further options of the source.
    """

    source: str
    path: str | None = None
    batch_size: int
    workers: int = 0
    on_error: Literal["raise", "skip"] = "raise"
    augment: Augmentation = dataclasses.field(default_factory=Augmentation)
    labelled_fraction: float | None = None
    unlabelled_batch_size: int | None = None
    regions: str | None = None
    region_crops: int = 4
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        positive(self, "batch_size", "unlabelled_batch_size", "region_crops")
        not_negative(self, "workers")
        if (self.labelled_fraction is None) != (self.unlabelled_batch_size is None):
            raise ValueError(
                "labelled_fraction and unlabelled_batch_size must be given together"
            )
        if self.labelled_fraction is not None and not 0 < self.labelled_fraction < 1:
            raise ValueError(
                f"labelled_fraction must be in (0, 1), got {self.labelled_fraction}"
            )
        if self.unlabelled_batch_size is not None and self.unlabelled_batch_size % 2:
            raise ValueError(
                "unlabelled_batch_size must be even (two halves are mixed), got "
                f"{self.unlabelled_batch_size}"
            )
        if self.regions is not None and self.batch_size % self.region_crops:
            raise ValueError(
                f"region_crops {self.region_crops} does not divide batch_size "
                f"{self.batch_size}"
            )
        if self.regions is not None and self.labelled_fraction is not None:
            raise ValueError("regions and labelled_fraction exclude each other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole run. `from_config` makes it from the nested dicts of a config.

    Attributes:
      networks: by name.
      stages: by name, in the order in which they run.
      run: that order. A ConfigDict sorts its keys, so it is named apart; stages left
        out do not run.
      data: where records come from.
      seed: of initialisation, data order and augmentation.
      seeds: several seeds, trained together in one program; results are means over
        them. They take the place of `seed`.
      precision: of the networks' computation; parameters and losses are float32.
      train: how the hot loop runs.
      profile: steps of every stage of which the first process writes a trace to
        `profile/` in the workdir, after two calls; 0 for none.
      notes: lines for the report.
    """

    networks: Mapping[str, NetworkPlan]
    stages: Mapping[str, StagePlan]
    run: tuple[str, ...]
    data: DataPlan
    seed: int = 0
    seeds: tuple[int, ...] = ()
    precision: Literal["float32", "bfloat16"] = "float32"
    evaluation: EvaluationPlan = dataclasses.field(default_factory=EvaluationPlan)
    checkpoint: CheckpointPlan = dataclasses.field(default_factory=CheckpointPlan)
    log: LogPlan = dataclasses.field(default_factory=LogPlan)
    mesh: MeshPlan = dataclasses.field(default_factory=MeshPlan)
    train: TrainPlan = dataclasses.field(default_factory=TrainPlan)
    profile: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.run:
            raise ValueError("run: names no stage, e.g. ('teacher', 'student')")
        for name in self.run:
            if name not in self.stages:
                raise ValueError(
                    f"run: no stage {name!r}; {nearest(name, self.stages)}"
                )
        if len(set(self.run)) < len(self.run):
            raise ValueError(f"run: a stage comes twice in {self.run}")
        for seed in (self.seed, *self.seeds):
            if not 0 <= seed < 2**32:
                raise ValueError(f"seed must be >= 0 and below 2**32, got {seed}")
        not_negative(self, "profile")
        if self.seeds:
            self._check_seeds()

    def _check_seeds(self) -> None:
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            raise ValueError(f"seeds must be two or more and differ, got {self.seeds}")
        if self.data.labelled_fraction is not None:
            raise ValueError(
                "seeds excludes data.labelled_fraction, whose split depends on the "
                "seed; start one run for each seed"
            )
        for name, stage in self.stages.items():
            if stage.keep == "best":
                raise ValueError(
                    f"seeds excludes stages.{name}.keep='best': the seeds have their "
                    "best evaluations at different steps; use keep='last'"
                )
            if stage.targets is not None:
                raise ValueError(
                    f"seeds excludes stages.{name}.targets, which are those of one "
                    "seed's teachers; start one run for each seed"
                )

    @property
    def images_per_step(self) -> int:
        """Training images of one step, over all devices and seeds."""
        return self.data.batch_size * max(1, len(self.seeds))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Plan:
        """Checks a config and returns the plan.

        Raises:
          ConfigError: one line that names the key, the value and the remedy.
        """
        plan = build(cls, config, "config")
        plan = dataclasses.replace(plan, stages={n: plan.stages[n] for n in plan.run})
        trained = _check_names(plan)
        networks = {n: plan.networks[n] for n in trained}
        return dataclasses.replace(plan, networks=networks)

    def learners(self, stage: str) -> tuple[str, ...]:
        """The networks that learn in a stage; usually one."""
        learner = self.stages[stage].learner or stage
        return (learner,) if isinstance(learner, str) else learner


def _check_names(plan: Plan) -> list[str]:
    """Checks that stages name networks and teachers that were trained before.

    Returns:
      The frozen networks that teach, then those that the run trains, in the order of
      their first stage.
    """
    known = ", ".join(plan.networks) or "none"
    frozen = [name for name, network in plan.networks.items() if network.frozen]
    trained: list[str] = []
    used: list[str] = []
    for name, stage in plan.stages.items():
        path = f"config.stages.{name}"
        learners = plan.learners(name)
        for learner in learners:
            if learner not in plan.networks:
                hint = "" if stage.learner else " (the stage's name; or set learner)"
                raise ConfigError(
                    f"{path}.learner: no network {learner!r}{hint}; networks: {known}"
                )
            if learner in frozen:
                raise ConfigError(f"{path}.learner: network {learner!r} is frozen")
        sources = [("teachers", teacher) for teacher in stage.teachers]
        if stage.start_from is not None:
            sources.append(("start_from", stage.start_from))
        for key, source in sources:
            if source not in plan.networks:
                raise ConfigError(
                    f"{path}.{key}: no network {source!r}; networks: {known}"
                )
            if source in learners:
                raise ConfigError(f"{path}.{key}: {source!r} is the learner itself")
            if source in frozen:
                used.append(source)
            elif source not in trained:
                raise ConfigError(
                    f"{path}.{key}: {source!r} is not trained by an earlier stage; "
                    f"trained so far: {', '.join(trained) or 'none'} (a network that "
                    "needs no training is frozen=True)"
                )
        begun = [learner for learner in learners if learner in trained]
        if stage.start_from is not None and begun:
            raise ConfigError(
                f"{path}.start_from: {begun[0]!r} was trained by an earlier stage and "
                "goes on from there; leave start_from out"
            )
        if begun and len(begun) < len(learners):
            raise ConfigError(
                f"{path}.learner: {begun[0]!r} was trained before and others of "
                f"{learners} were not; networks that learn together start together"
            )
        if stage.keep == "best" and plan.evaluation.every_epochs is None:
            raise ConfigError(
                f"{path}.keep: 'best' needs evaluation between epochs; set "
                "config.evaluation.every_epochs"
            )
        if plan.data.batch_size % stage.accumulate:
            raise ConfigError(
                f"{path}.accumulate: {stage.accumulate} does not divide "
                f"config.data.batch_size {plan.data.batch_size}"
            )
        trained += [learner for learner in learners if learner not in trained]
    return list(dict.fromkeys([*used, *trained]))
