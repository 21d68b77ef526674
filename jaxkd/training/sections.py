"""The parts of a plan that its sections of the config make, one class for each.

Each checks in `__post_init__` what can be known without data, networks or the other
sections; `jaxkd.training.plan` puts them together.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal


def positive(owner: Any, *names: str) -> None:
    """Raises ValueError unless each field named is None, or > 0 and finite."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")


def not_negative(owner: Any, *names: str) -> None:
    """Raises ValueError unless each field named is None, or >= 0 and finite."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")


def fraction(owner: Any, *names: str) -> None:
    """Raises ValueError unless each field named is None, or in [0, 1)."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")


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
      exchange: how devices exchange gradients of their own records, e.g.
        `{"name": "dgc", "ratio": 0.001}` (see `jaxkd.exchange`); None sums gradients of
        the global batch.
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
    exchange: Mapping[str, Any] | None = None

    def __post_init__(self):
        if self.exchange is not None and not isinstance(self.exchange.get("name"), str):
            raise ValueError("exchange needs a name, e.g. {'name': 'dgc'}")
        positive(self, "learning_rate", "factor", "epsilon", "clip_norm")
        not_negative(self, "end_learning_rate", "warmup_epochs", "weight_decay")
        fraction(self, "momentum", "beta1", "beta2")
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
        positive(self, "views", "top_k", "shard_mebibytes", "regions")
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
      select: which records it trains on: a selection's `name` and its options, see
        `jaxkd.select`; without it all of them in random order.
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
    select: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    start_from: str | None = None
    freeze: tuple[str, ...] = ()
    frozen_batch_norm: Literal["train", "eval"] = "train"
    accumulate: int = 1
    ema: float | None = None
    keep: Literal["last", "best"] = "last"

    def __post_init__(self):
        positive(self, "epochs", "accumulate")
        fraction(self, "ema")
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
        positive(self, "every_epochs", "batch_size")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {self.threshold}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """When the whole state is saved: every `every_steps`, or after every epoch."""

    every_steps: int | None = None
    keep: int = 1

    def __post_init__(self):
        positive(self, "every_steps", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogPlan:
    """How often metrics are read from the devices, and where they go."""

    every_steps: int = 20
    tensorboard: bool = False

    def __post_init__(self):
        positive(self, "every_steps")


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
        positive(self, "fsdp", "model", "fsdp_min_size")
        if self.data == 0 or self.data < -1:
            raise ValueError(
                f"data must be > 0, or -1 for all devices, got {self.data}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """How the hot loop runs; none of it changes the results.

    Attributes:
      steps_per_call: optimiser steps in one program, `"epoch"` for as many as an epoch
        has. What comes between steps (log records, signals) waits for all of them: a
        signal for the call that runs and the one after it, or for four of one step. A
        call ends where an evaluation or a save is due; up to four programs of
        different lengths are compiled for a stage.
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
            positive(self, "steps_per_call")

    def steps(self, steps_per_epoch: int) -> int:
        """The optimiser steps of one call."""
        if self.steps_per_call == "epoch":
            return steps_per_epoch
        return self.steps_per_call
