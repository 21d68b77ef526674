"""Labels of random crops for FKD: `--mode=label` with `targets.regions`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.data.regions import Regions, read_regions, store_regions, write_regions
from jaxkd.data.targets import Manifest, describe_file, write_manifest
from jaxkd.training.network import Variables
from jaxkd.training.setup import Setup
from jaxkd.training.sharding import replicated
from jaxkd.training.stage import Stage
from jaxkd.training.target_files import REGIONS, Verified, slack

_CROPS_PER_CALL, _SAMPLE = 50, 8


def write_region_labels(
    setup: Setup,
    stage: Stage,
    variables: Mapping[str, Variables],
    folder: Path,
    identity: dict[str, Any],
) -> None:
    """Writes `regions.npz`, as `config.data.regions` reads it, and a manifest.

    Args:
      setup: the objects of the run.
      stage: whose teacher is asked.
      variables: the teacher's.
      folder: made if missing.
      identity: for the manifest.
    """
    regions = _label(setup, stage, variables, None)
    folder.mkdir(parents=True, exist_ok=True)
    write_regions(folder / REGIONS, regions)
    records, crops = regions.flip.shape
    file = describe_file(folder / REGIONS, records * crops)
    manifest = Manifest(
        identity=identity, records=records, views=crops, fields={}, shards=(file,)
    )
    write_manifest(folder, manifest)


def verify_regions(
    setup: Setup,
    stage: Stage,
    variables: Mapping[str, Variables],
    folder: Path,
    *,
    seed: int = 0,
) -> Verified:
    """Compares the labels of some records with what the teacher says now.

    Args:
      setup: the objects of the run.
      stage: whose teacher is asked.
      variables: the teacher's.
      folder: where the labels lie.
      seed: of the sample.
    """
    stored = read_regions(folder / REGIONS)
    records = np.random.default_rng(seed).permutation(len(stored.flip))[:_SAMPLE]
    fresh = _label(setup, stage, variables, records.tolist())
    # Probabilities of classes in the order of their size: equal ones may swap.
    error = np.abs(stored.probability[records] - fresh.probability).max((1, 2))
    boxes = np.abs(stored.coords[records] - fresh.coords).max((1, 2))
    flips = (stored.flip[records] != fresh.flip).any(1)
    allowed = np.full(len(records), slack(setup))
    found = Verified(records=stored.flip[records].size)
    found = found.worse("the labels of regions", error, allowed)
    return found.worse("the boxes of regions", boxes + flips, np.full_like(boxes, 1e-6))


def _label(
    setup: Setup,
    stage: Stage,
    variables: Mapping[str, Variables],
    records: Sequence[int] | None,
) -> Regions:
    plan = stage.plan.targets
    assert plan is not None and plan.regions is not None
    height, width, _ = setup.train.info.image_shape
    seed = setup.plan.seed if plan.seed is None else plan.seed
    return store_regions(
        setup.train,
        _predict(setup, stage, variables),
        regions=plan.regions,
        key=jax.random.key(seed),
        image_size=(height, width),
        label_format=plan.label_format,
        batch_size=min(plan.regions, _CROPS_PER_CALL),
        records=records,
    )


def _predict(
    setup: Setup, stage: Stage, variables: Mapping[str, Variables]
) -> Callable[[jax.Array], jax.Array]:
    """From crops, as the source delivers images, to the teacher's logits."""
    (teacher,) = stage.teachers
    own = jax.device_put(variables[teacher.name], replicated(setup.mesh))

    def predict(crops: jax.Array) -> jax.Array:
        labels = jnp.zeros(len(crops), jnp.int32)
        batch = setup.plan.data.augment.evaluate({"image": crops, "label": labels})
        return teacher.apply(own, batch["image"], train=False, key=None)[0].logits

    return predict
