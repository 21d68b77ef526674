"""The plan of a run: what a config says, as frozen dataclasses that check themselves.

Nothing below `main` ever sees a ConfigDict. These classes check what can be known
without data or networks; `jaxkd.training.setup` builds the objects and checks the rest.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from jaxkd.data.augment import Augmentation
from jaxkd.registry import nearest
from jaxkd.training.schema import ConfigError, build


def _positive(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")


def _not_negative(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")


def _fraction(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")


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
      options: of the family.
    """

    name: str
    input: InputPlan | None = None
    frozen: bool = False
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
        _positive(self, "batch_size", "unlabelled_batch_size", "region_crops")
        _not_negative(self, "workers")
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
class OptimizerPlan:
    """An optax optimiser with its learning-rate schedule.

    Attributes:
      name: `sgd` and `adam` add the weight decay to the gradient (as PyTorch does);
        `adamw` and `lamb` decouple it.
      learning_rate: the peak learning rate.
      schedule: its course after the warm-up.
      end_learning_rate: where `cosine` and `linear` end.
      warmup_epochs: linear warm-up from 0.
      milestones: epochs after which `multistep` multiplies by `factor`.
      granularity: whether the rate changes at every step or at every epoch.
      momentum: of SGD.
      weight_decay: strength; `weight_decay_mask` says on which parameters
        (`kernels`: those with two axes or more).
      clip_norm: bound of the global gradient norm.
    """

    name: Literal["sgd", "adam", "adamw", "lamb"] = "sgd"
    learning_rate: float
    schedule: Literal["constant", "cosine", "linear", "multistep"] = "constant"
    end_learning_rate: float = 0.0
    warmup_epochs: float = 0.0
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    granularity: Literal["step", "epoch"] = "step"
    momentum: float = 0.9
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    weight_decay_mask: Literal["all", "kernels"] = "all"
    clip_norm: float | None = None

    def __post_init__(self):
        _positive(self, "learning_rate", "factor", "epsilon", "clip_norm")
        _not_negative(self, "end_learning_rate", "warmup_epochs", "weight_decay")
        _fraction(self, "momentum", "beta1", "beta2")
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError("schedule 'multistep' needs milestones, e.g. (150, 180)")
        if self.schedule != "multistep" and self.milestones:
            raise ValueError(
                f"milestones are for schedule 'multistep', not {self.schedule!r}"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must increase, got {self.milestones}")
        if self.end_learning_rate > self.learning_rate:
            raise ValueError(
                f"end_learning_rate {self.end_learning_rate} is above "
                f"learning_rate {self.learning_rate}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetsPlan:
    """Teacher targets that `--mode=label` writes and the stage reads.

    Attributes:
      path: their folder; `<workdir>/targets/<stage>` if None.
      views: how many augmented views of each record are stored. Epoch `e` shows view
        `e % views`, so `views = epochs` is what a live teacher would have said.
      seed: of the views' augmentation, for targets that runs of other seeds read;
        None draws what the stage draws with a live teacher.
      format: of the logits: all of them, all in uint8 codes (a scale and an offset for
        each record), or the log-probabilities of the `top_k` largest classes and of
        all others together.
      top_k: classes kept by the format "topk".
      dtype: of the numbers that the formats "full" and "topk" store.
      taps: feature maps of the teachers that are stored as well.
      taps_dtype: theirs.
      shard_mebibytes: size of a file.
      regions: instead of views of whole images, so many random crops of each record
        are labelled for `config.data.regions` (FKD).
      label_format: of the labels of regions (see `jaxkd.numerics.compressed_labels`).
    """

    path: str | None = None
    views: int = 1
    seed: int | None = None
    format: Literal["full", "uint8", "topk"] = "full"
    top_k: int | None = None
    dtype: Literal["float32", "float16"] = "float32"
    taps: tuple[str, ...] = ()
    taps_dtype: Literal["float32", "float16"] = "float16"
    shard_mebibytes: int = 64
    regions: int | None = None
    label_format: str = "marginal_smoothing_k5"

    def __post_init__(self):
        _positive(self, "views", "top_k", "shard_mebibytes", "regions")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be >= 0 and below 2**32, got {self.seed}")
        if (self.format == "topk") != (self.top_k is not None):
            raise ValueError(
                f"top_k goes with format 'topk'; got top_k {self.top_k} and format "
                f"{self.format!r}"
            )
        if self.format == "uint8" and self.dtype != "float32":
            raise ValueError("dtype is for the formats 'full' and 'topk'")
        if len(set(self.taps)) < len(self.taps):
            raise ValueError(f"taps names one twice: {self.taps}")
        if self.regions is not None and (
            self.views > 1 or self.taps or self.format != "full"
        ):
            raise ValueError(
                "regions have a label_format; views, format and taps are for whole "
                "images"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Who learns, from whom, by which method, for how long.

    Attributes:
      method: the parts of the loss by name, e.g.
        `{"ce": {"weight": 0.1}, "kd": {"weight": 0.9, "temperature": 4.0}}`.
        `weight` is a number or a schedule
        (`{"schedule": "linear", "start": 0.0, "end": 1.0, "epochs": 20}`), and so
        are temperatures. A part is the method of its name, unless `name` names
        another, or `"package.module:function"`, a function that makes a `Method`;
        `loss` names a plain loss function in the same way.
      epochs: passes over the training split.
      optimizer: see `OptimizerPlan`.
      learner: the network that learns; the stage's own name if not given. A network
        that an earlier stage trained goes on from there. Several names: networks that
        learn together, from each other.
      start_from: a network trained before; every array of its variables that the
        learner has under the same path with the same shape is copied before the first
        step.
      freeze: patterns (`re.search`) of parameter paths such as
        `"trunk/stage3_block1/conv1/kernel"` that this stage does not change.
      frozen_batch_norm: whether batch norms with frozen parameters still use and
        record batch statistics ("train") or use their stored ones ("eval").
      teachers: networks that earlier stages trained.
      targets: where the teachers' answers are stored; None runs the teachers.
      accumulate: micro-batches per optimiser step.
      ema: decay of the running average of the variables that is evaluated and handed
        on, or None.
      keep: hand on the variables of the last step or of the best evaluation.
    """

    method: Mapping[str, Mapping[str, Any]]
    epochs: int
    optimizer: OptimizerPlan
    learner: str | tuple[str, ...] | None = None
    teachers: tuple[str, ...] = ()
    targets: TargetsPlan | None = None
    start_from: str | None = None
    freeze: tuple[str, ...] = ()
    frozen_batch_norm: Literal["train", "eval"] = "train"
    accumulate: int = 1
    ema: float | None = None
    keep: Literal["last", "best"] = "last"

    def __post_init__(self):
        _positive(self, "epochs", "accumulate")
        _fraction(self, "ema")
        if not self.method:
            raise ValueError("method names no loss, e.g. {'ce': {'weight': 1.0}}")
        if isinstance(self.learner, tuple) and (
            not self.learner or len(set(self.learner)) < len(self.learner)
        ):
            raise ValueError(
                f"learner must name different networks, got {self.learner}"
            )
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"freeze: {pattern!r} is no regular expression ({error})"
                ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """How networks are judged on the test split.

    Attributes:
      every_epochs: evaluation between epochs; None evaluates at the end only.
      batch_size: records per evaluation batch; the training batch size if None.
      metric: the metric that tells the best checkpoint (larger is better); `dice` or
        `accuracy` if None.
      threshold: foreground probability of a two-class segmentation.
    """

    every_epochs: int | None = 1
    batch_size: int | None = None
    metric: str | None = None
    threshold: float = 0.5

    def __post_init__(self):
        _positive(self, "every_epochs", "batch_size")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {self.threshold}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """When the whole state is saved: every `every_steps`, or after every epoch."""

    every_steps: int | None = None
    keep: int = 1

    def __post_init__(self):
        _positive(self, "every_steps", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogPlan:
    """How often metrics are read from the devices, and where they go."""

    every_steps: int = 20
    tensorboard: bool = False

    def __post_init__(self):
        _positive(self, "every_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """How the devices share the work; the axes multiply to the number of devices.

    Attributes:
      data: devices along `data`, over which batches are split; -1: all that are left.
      fsdp: devices along `fsdp`, over which batches and large arrays of the state are
        split.
      model: devices along `model`, over which layers are split; for networks that say
        how (ViT, DeiT).
      fsdp_min_size: elements from which an array is large.
      teacher: whether every device has whole teachers, or a part of their large arrays
        (over `fsdp`, or over `data` where there is no `fsdp`). "auto": whole ones if
        they take at most a quarter of a device's memory.
    """

    data: int = -1
    fsdp: int = 1
    model: int = 1
    fsdp_min_size: int = 4096
    teacher: Literal["auto", "replicated", "sharded"] = "auto"

    def __post_init__(self):
        _positive(self, "fsdp", "model", "fsdp_min_size")
        if self.data == 0 or self.data < -1:
            raise ValueError(
                f"data must be > 0, or -1 for all devices, got {self.data}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """How the hot loop runs; none of it changes the results.

    Attributes:
      steps_per_call: optimiser steps in one program, `"epoch"` for as many as an epoch
        has. What comes between steps (log records, signals) waits for all of them;
        evaluations and saves shorten a call.
      resident: whether the training records live on the devices, in the dtype of the
        source, instead of being sent for every step. "auto": if they are in memory
        anyway and fill at most an eighth of the devices' memory.
      remat: what the backward pass of the networks that learn recomputes instead of
        keeping it. "dots": all of a block but the results of its convolutions and
        matrix products; "blocks": all of a block. A network's own option `remat` goes
        before.
    """

    steps_per_call: int | Literal["epoch"] = 1
    resident: Literal["auto"] | bool = "auto"
    remat: Literal["none", "dots", "blocks"] = "none"

    def __post_init__(self):
        if self.steps_per_call != "epoch":
            _positive(self, "steps_per_call")

    def steps(self, steps_per_epoch: int) -> int:
        """The optimiser steps of one call."""
        if self.steps_per_call == "epoch":
            return steps_per_epoch
        return self.steps_per_call


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
      profile: steps of every stage of which a trace is written to `profile/` in the
        workdir; 0 for none.
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
        _not_negative(self, "profile")
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
