"""What is checked of a run beside its stages: data, selections, mesh and tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jaxkd.data import Source
from jaxkd.data.regions import RegionSource
from jaxkd.data.targets import check_crop_box
from jaxkd.training import sharding
from jaxkd.training.network import Network
from jaxkd.training.plan import Plan
from jaxkd.training.schema import ConfigError, at
from jaxkd.training.stage import Stage


def check_selections(plan: Plan, stages: Sequence[Stage], resident: bool) -> None:
    """Checks that a host can read what a selection picks."""
    for stage in stages:
        path = f"config.stages.{stage.name}.select"
        if stage.selection is None:
            continue
        if plan.data.regions is not None:
            raise ConfigError(
                f"{path}: with config.data.regions a record has several crops, "
                "so that records cannot be selected; leave one of them out"
            )
        if stage.selection.pick is None or resident:
            continue
        remedy = "set config.train.resident=True"
        if plan.train.steps(stage.steps_per_epoch) > 1:
            raise ConfigError(
                f"{path}: the losses of a step decide the records of later ones, which "
                f"are streamed one step at a time; {remedy}, or "
                "config.train.steps_per_call=1"
            )
        if plan.seeds:
            raise ConfigError(
                f"{path}: seeds that pick their own records need them on the devices; "
                f"{remedy}"
            )


def check_augmentation(plan: Plan, train: Source) -> None:
    """Checks what depends on the task and on the kind of images."""
    augment = plan.data.augment
    if train.info.task == "segmentation":
        for name in ("mixup", "cutmix", "strong"):
            if getattr(augment, name):
                raise ValueError(
                    f"{name} needs one label per image; leave it out for segmentation"
                )
    if augment.strong is not None:
        image = train[0]["image"]
        in_range = image.dtype == np.uint8 or (image.min() >= 0 and image.max() <= 1)
        if image.shape[-1] not in (1, 3) or not in_range:
            raise ValueError(
                f"strong needs images of 1 or 3 channels with values in [0, 1]; "
                f"{train.info.name!r} has {image.shape[-1]} channels from "
                f"{image.min():g} to {image.max():g}"
            )
    if isinstance(train, RegionSource):
        stored = train.regions.coords.shape[1]
        if plan.data.region_crops > stored:
            raise ValueError(
                f"region_crops is {plan.data.region_crops} but {stored} regions are "
                "stored for each record"
            )
        geometry = {"flip": "none", "rot90": False, "pad_crop": 0, "rotate": 0.0}
        for name, off in geometry.items():
            if getattr(augment, name) != off:
                raise ValueError(
                    f"{name} would change crops whose labels are stored; leave it out"
                )
        if plan.data.regions is not None:
            check_crop_box(Path(plan.data.regions), augment.crop_box)


def check_model_axis(plan: Plan, networks: Mapping[str, Network], mesh: Mesh) -> None:
    """Checks that networks can be split over `model`.

    Those that only teach may be whole on every device.
    """
    if plan.mesh.model == 1:
        return
    for name, network in networks.items():
        if network.partition is None:
            if plan.networks[name].frozen:
                continue
            raise ConfigError(
                f"config.mesh.model: {plan.mesh.model}, but network {name!r} "
                f"({plan.networks[name].name}) does not say how its layers are split; "
                "set it to 1 and use config.mesh.fsdp, or train a network that does, "
                "such as deit_small"
            )
        variables = jax.eval_shape(network.init, jax.random.key(0))
        with at(f"config.mesh.model: network {name!r}"):
            sharding.model_splits(variables["params"], network.partition, mesh)


def check_task(network: Network, task: str) -> None:
    """Checks that a network predicts images or pixels, as the data have labels.

    Raises:
      ConfigError: it does not.
    """
    dense = len(network.spec.logits) == 3
    if dense != (task == "segmentation"):
        kind = "segmentation" if dense else "classification"
        raise ConfigError(
            f"config.networks.{network.name}.name: a {kind} network, "
            f"but the data are for {task}"
        )
