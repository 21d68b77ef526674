"""From a plan to the objects of a run: data, networks, methods, mesh.

Everything that can be wrong is found here, before the first step: the shapes come from
abstract evaluation, so no array is made.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxkd import data
from jaxkd.analysis.costs import Costs
from jaxkd.data import Source
from jaxkd.data.arrays import ArraySource
from jaxkd.data.fingerprint import source_fingerprint
from jaxkd.data.regions import (
    RegionAugmentation,
    RegionSource,
    read_regions,
    with_regions,
)
from jaxkd.data.source import read_labels
from jaxkd.data.split import split_labelled
from jaxkd.data.targets import check_data
from jaxkd.distill.method import DataSpec
from jaxkd.training import sharding
from jaxkd.training.calls import check_call
from jaxkd.training.feeds import choose_resident
from jaxkd.training.network import Network
from jaxkd.training.networks import make_network, network_costs
from jaxkd.training.plan import Plan
from jaxkd.training.schema import ConfigError, at
from jaxkd.training.seeds import Seeds
from jaxkd.training.setup_checks import (
    check_augmentation,
    check_model_axis,
    check_selections,
    check_task,
)
from jaxkd.training.stage import Stage, make_stage
from jaxkd.training.step import Augments
from jaxkd.training.workdir import import_tensorboard

# Metrics that can tell the best checkpoint: larger is better.
_SCORES = {
    "segmentation": ("dice", "iou"),
    "classification": ("accuracy", "macro_f1"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """All objects of a run."""

    plan: Plan
    mesh: Mesh
    train: Source
    unlabelled: Source | None
    test: Source
    networks: Mapping[str, Network]
    stages: tuple[Stage, ...]
    costs: Mapping[str, Costs]
    resident: bool

    @property
    def seeds(self) -> Seeds:
        """The seeds that are trained together; usually one."""
        return Seeds(self.plan.seeds or (self.plan.seed,))

    @property
    def task(self) -> str:
        """`"classification"` or `"segmentation"`."""
        return self.train.info.task

    @property
    def metric(self) -> str:
        """The metric that tells the best checkpoint."""
        return self.plan.evaluation.metric or _SCORES[self.task][0]

    @property
    def augmentation(self) -> Augments:
        """What prepares the training batches."""
        plan = self.plan.data
        if not isinstance(self.train, RegionSource):
            return plan.augment
        height, width, _ = self.train.info.image_shape
        return RegionAugmentation(
            augmentation=plan.augment,
            crops=plan.region_crops,
            size=(height, width),
            label_format=self.train.regions.label_format,
        )

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What tells the training records from others; reads many of them."""
        return source_fingerprint(self.train)

    @property
    def eval_batch_size(self) -> int:
        """Records per evaluation batch, rounded up to what the devices can share."""
        size = self.plan.evaluation.batch_size or self.plan.data.batch_size
        parts = sharding.batch_parts(self.mesh)
        return -(-size // parts) * parts


def make_setup(plan: Plan) -> Setup:
    """Builds and checks everything a plan names.

    Raises:
      ConfigError: one line that names the config key and what is wrong.
    """
    with at("config.mesh"):
        mesh = sharding.make_mesh(
            data=plan.mesh.data, fsdp=plan.mesh.fsdp, model=plan.mesh.model
        )
        sharding.process_part(mesh)
    with at("config.log.tensorboard"):
        if plan.log.tensorboard:
            import_tensorboard()
    train, test = _load_data(plan)
    in_memory = isinstance(train, ArraySource)
    unlabelled = None
    with at("config.data"):
        if plan.data.labelled_fraction is not None:
            train, unlabelled = split_labelled(
                train, plan.data.labelled_fraction, seed=plan.seed
            )
        if plan.data.regions is not None:
            check_data(Path(plan.data.regions), train)
            train = with_regions(train, read_regions(plan.data.regions))
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
        if plan.data.unlabelled_batch_size is not None:
            with at("config.data.unlabelled_batch_size: each half"):
                sharding.check_batch_size(
                    plan.data.unlabelled_batch_size // 2,
                    mesh,
                    accumulate=stage.accumulate,
                )
    if plan.data.regions is not None:
        with at("config.data.batch_size: records, each with its crops"):
            records = plan.data.batch_size // plan.data.region_crops
            sharding.check_batch_size(records, mesh)
    data_spec = _data_spec(plan, train, unlabelled)
    with at("config.data.augment"):
        input_shape = plan.data.augment.output_shape(train.info.image_shape)
        check_augmentation(plan, train)

    with at("config.train.resident"):
        resident = choose_resident(
            plan.train.resident,
            train,
            mesh,
            supported=unlabelled is None,
            in_memory=in_memory,
        )

    networks = {}
    learners = {name for stage in plan.stages for name in plan.learners(stage)}
    for name, network_plan in plan.networks.items():
        with at(f"config.networks.{name}"):
            networks[name] = make_network(
                name,
                network_plan,
                input_shape=input_shape,
                num_classes=train.info.num_classes,
                precision=plan.precision,
                remat=plan.train.remat if name in learners else "none",
                normalisation=plan.data.augment.normalisation,
            )
        check_task(networks[name], train.info.task)
    check_model_axis(plan, networks, mesh)

    stages, trained, costs = _stages(plan, networks, data_spec, input_shape, mesh)
    check_selections(plan, stages, resident)
    for stage in stages:
        with at("config.train.steps_per_call"):
            check_call(
                plan,
                stage,
                mesh,
                train=train,
                unlabelled=unlabelled,
                resident=resident,
            )
    return Setup(
        plan=plan,
        mesh=mesh,
        train=train,
        unlabelled=unlabelled,
        test=test,
        networks=trained,
        stages=stages,
        costs=costs,
        resident=resident,
    )


def _entries(plan: Plan) -> set[str]:
    """What a batch holds beside image, label and index."""
    augment = plan.data.augment
    entries = {f"image_{view}" for view in augment.views}
    if plan.data.unlabelled_batch_size is not None:
        entries.add("unlabelled_image")
    if plan.data.regions is not None or augment.mixup or augment.cutmix:
        entries.add("target")
    return entries


def _stages(
    plan: Plan,
    networks: Mapping[str, Network],
    data_spec: DataSpec,
    input_shape: tuple[int, int, int],
    mesh: Mesh,
) -> tuple[tuple[Stage, ...], dict[str, Network], dict[str, Costs]]:
    """The stages, the networks as they predict in the end, and what these cost."""
    stages, phases = [], dict.fromkeys(plan.networks, 0)
    costs: dict[str, Costs] = {}
    for name, network_plan in plan.networks.items():
        if network_plan.frozen:
            variables = jax.eval_shape(networks[name].init, jax.random.key(0))
            costs[name] = network_costs(networks[name], variables, input_shape)
    # Networks as they predict after the latest stage that trained them.
    trained = dict(networks)
    entries = _entries(plan)
    for name, stage_plan in plan.stages.items():
        learners = plan.learners(name)
        stage = make_stage(
            name,
            stage_plan,
            learners={learner: networks[learner] for learner in learners},
            teachers=tuple(trained[t] for t in stage_plan.teachers),
            source=trained.get(stage_plan.start_from or ""),
            known={n: trained[n] for n in costs},
            data=data_spec,
            entries=entries,
            input_shape=input_shape,
            phase=phases[learners[0]],
            mesh=mesh,
        )
        stages.append(stage)
        trained |= stage.members
        for learner in learners:
            phases[learner] += 1
        finals = jax.eval_shape(
            lambda key, stage=stage: stage.final_variables(stage.init_state(key)),
            jax.random.key(0),
        )
        for learner, variables in finals.items():
            costs[learner] = network_costs(trained[learner], variables, input_shape)
    return tuple(stages), trained, costs


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


def _data_spec(plan: Plan, train: Source, unlabelled: Source | None) -> DataSpec:
    """What methods are told of the data; `epochs` is filled in for each stage."""
    size = plan.data.batch_size
    steps = len(train) // size
    if plan.data.regions is not None and len(train) >= size // plan.data.region_crops:
        # An epoch has as many crops as there are records.
        steps = max(steps, 1)
    if unlabelled is not None:
        # An epoch passes over the larger of the two sets.
        other = len(unlabelled) // (plan.data.unlabelled_batch_size or size)
        if not other:
            raise ConfigError(
                f"config.data.unlabelled_batch_size: "
                f"{plan.data.unlabelled_batch_size} is more than the "
                f"{len(unlabelled)} unlabelled records of {unlabelled.info.name!r}"
            )
        steps = max(steps, other) if steps else 0
    if not steps:
        kind = "labelled training" if unlabelled is not None else "training"
        raise ConfigError(
            f"config.data.batch_size: {size} is more than the {len(train)} {kind} "
            f"records of {train.info.name!r}"
        )
    return DataSpec(
        records=len(train),
        num_classes=train.info.num_classes,
        batch_size=size,
        steps_per_epoch=steps,
        epochs=1,
        read_labels=(
            functools.partial(read_labels, train)
            if train.info.task == "classification"
            else None
        ),
    )
