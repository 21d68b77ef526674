"""The batches of a stage, as its data and its seeds ask for them."""

from __future__ import annotations

from typing import Any

from jaxkd.data import Source, pipeline
from jaxkd.training.feeds import Feed, Resident, Streaming
from jaxkd.training.setup import Setup
from jaxkd.training.sharding import process_part
from jaxkd.training.stage import Stage


def make_feed(
    setup: Setup, stage: Stage, *, extra: pipeline.Extra | None = None
) -> Feed:
    """What gives the stage its batches; for `extra` see `train_batches`."""
    batches = train_batches(setup, stage, extra=extra)
    if setup.resident:
        return Resident(setup.train, batches, setup.mesh)
    return Streaming(batches)


def train_batches(
    setup: Setup, stage: Stage, *, extra: pipeline.Extra | None = None
) -> Any:
    """The batches of a stage, this process's part of each.

    With stored region labels a record fills several places of a batch; with unlabelled
    data each batch also has unlabelled images. Either way there are
    `stage.total_steps` batches, and a set that is used up begins anew.

    Args:
      setup: the run.
      stage: the stage.
      extra: adds entries to the labelled records, such as stored targets.
    """
    data = setup.plan.data
    part, parts = process_part(setup.mesh)

    def batches(
        source: Source, size: int, *, seed: int, extra: pipeline.Extra | None = None
    ) -> pipeline.TrainBatches:
        rounds = -(-stage.total_steps // (len(source) // size))
        return pipeline.train_batches(
            source,
            batch_size=size,
            seed=seed,
            epochs=rounds,
            workers=data.workers,
            process_index=part,
            process_count=parts,
            extra=extra,
        )

    crops = data.region_crops if data.regions is not None else 1
    size = data.batch_size // crops
    if setup.seeds.several:
        return pipeline.Stacked(
            [
                batches(setup.train, size, seed=seed, extra=extra)
                for seed in setup.seeds.seeds
            ]
        )
    seed = setup.seeds.seeds[0]
    labelled = batches(setup.train, size, seed=seed, extra=extra)
    if setup.unlabelled is None or data.unlabelled_batch_size is None:
        return labelled
    # Another seed: the two sets must not go round in step.
    other = batches(setup.unlabelled, data.unlabelled_batch_size, seed=seed + 1)
    return pipeline.WithUnlabelled(labelled, other, stage.total_steps)
