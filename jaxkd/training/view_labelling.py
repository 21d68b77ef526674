"""Answers to augmented views of whole images: `--mode=label` with `targets.views`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkd.data import pipeline
from jaxkd.data.target_writer import TargetsWriter
from jaxkd.data.targets import Manifest, Targets, open_targets
from jaxkd.training import sharding
from jaxkd.training.label_writing import InOrder, write_answers
from jaxkd.training.network import Variables
from jaxkd.training.paths import path_name
from jaxkd.training.placement import place
from jaxkd.training.setup import Setup
from jaxkd.training.signals import StopSignal
from jaxkd.training.stage import Stage
from jaxkd.training.stored import StoredTeachers, packed
from jaxkd.training.target_files import (
    Verified,
    constants_of,
    read_constants,
    slack,
)

_SAMPLED_VIEWS = 3


@dataclasses.dataclass(frozen=True)
class Answers:
    """The teachers of a stage, compiled.

    Attributes:
      ask: `ask(batch, view)` are the answers to a batch of training images in an
        epoch, float32 and not packed.
      encode: packs them.
    """

    ask: Callable[[pipeline.Batch, int], dict[str, jax.Array]]
    encode: Callable[[dict[str, jax.Array]], dict[str, jax.Array]]


def make_answers(
    setup: Setup, stage: Stage, variables: Mapping[str, Variables]
) -> Answers:
    """Compiles the teachers of a stage behind the stage's own augmentation."""
    stored, key = _stored(stage), stage.augmentation_key(setup.seeds.keys())
    augment, num_classes = setup.plan.data.augment, stage.data.num_classes
    # Where they would be if they ran in every step.
    placed, on_mesh = place(setup, dataclasses.replace(stage, stored=None), variables)

    @jax.jit
    def answer(
        variables: tuple[Variables, ...],
        batch: dict[str, jax.Array],
        key: jax.Array,
        view: jax.Array,
    ) -> dict[str, jax.Array]:
        seen = augment.train(batch, key=key, epoch=view, num_classes=num_classes)
        outputs = [
            teacher.apply(v, seen["image"], train=False, key=None)[0]
            for teacher, v in zip(placed.teachers, variables, strict=True)
        ]
        return stored.answers(outputs)

    def ask(batch: pipeline.Batch, view: int) -> dict[str, jax.Array]:
        given = {name: batch[name] for name in ("image", "label", "index")}
        on_devices = sharding.put_batch(given, setup.mesh)
        return answer(on_mesh, on_devices, key, np.int32(view))

    return Answers(ask, jax.jit(stored.encode))


def _stored(stage: Stage) -> StoredTeachers:
    if stage.stored is None:
        raise ValueError(f"stage {stage.name!r} stores no answers to whole images")
    return stage.stored


@dataclasses.dataclass(frozen=True)
class ViewLabels:
    """What the teachers of a stage say of all views of all training records.

    Attributes:
      setup: the objects of the run.
      stage: whose teachers are asked.
      variables: theirs.
    """

    setup: Setup
    stage: Stage
    variables: Mapping[str, Variables]

    def write(self, folder: Path, identity: dict[str, Any], stop: StopSignal) -> None:
        """Writes the answers.

        Args:
          folder: there is nothing yet, or what an interrupted call left beside it.
          identity: for the manifest.
          stop: read between batches.

        Raises:
          Stopped: a signal came; whole files are kept and not written again.
          ValueError: an answer is not finite in its format.
          OSError: the folder cannot be written.
        """
        setup, stored, data = self.setup, _stored(self.stage), self.setup.plan.data
        records, views = len(setup.train), stored.plan.views
        manifest = Manifest(
            identity=identity, records=records, views=views, fields=stored.fields
        )
        writer = TargetsWriter(
            folder, manifest, shard_bytes=stored.plan.shard_mebibytes * 2**20
        )
        try:
            answers = make_answers(setup, self.stage, self.variables)
            write_answers(
                writer,
                lambda batch, view: answers.encode(answers.ask(batch, view)),
                InOrder(setup.train, batch_size=data.batch_size, views=views),
                records=records,
                stage=self.stage.name,
                workers=data.workers,
                stop=stop,
            )
            constants = constants_of(self.stage, stored, self.variables)
            writer.finish(
                {
                    path_name(path): np.asarray(leaf, np.float32)
                    for path, leaf in jax.tree.leaves_with_path(constants)
                }
            )
        finally:
            writer.close()

    def check_files(self, folder: Path) -> None:
        """Checks every byte, and that the stage finds what its method reads.

        Raises:
          DamagedFileError: a file is damaged.
          ConfigError: the method reads layers that are not stored.
        """
        with contextlib.closing(open_targets(folder)) as targets:
            targets.check_files()
            read_constants(self.stage, _stored(self.stage), targets)

    def verify(self, folder: Path) -> Verified:
        """Compares a sample with what the teachers say now."""
        with contextlib.closing(open_targets(folder)) as targets:
            return verify(self.setup, self.stage, self.variables, targets)


def verify(
    setup: Setup,
    stage: Stage,
    variables: Mapping[str, Variables],
    targets: Targets,
    *,
    seed: int = 0,
) -> Verified:
    """Compares a sample of stored targets with what the teachers say now.

    Args:
      setup: the objects of the run.
      stage: whose teachers are asked.
      variables: theirs.
      targets: what was stored.
      seed: of the sample: a batch of records in each of up to three views.
    """
    stored, rng = _stored(stage), np.random.default_rng(seed)
    answers = make_answers(setup, stage, variables)
    size, records = setup.plan.data.batch_size, len(setup.train)
    views = rng.permutation(stored.plan.views)[:_SAMPLED_VIEWS]
    found = Verified()
    for view in views.tolist():
        rows = np.sort(rng.permutation(records)[:size]).astype(np.int32)
        batch = pipeline.read_records(setup.train, np.resize(rows, size))
        fresh = answers.ask(batch, view)
        kept = targets.read(view, rows)
        for name, codec in stored.codecs.items():
            live = np.asarray(fresh[name])[: len(rows)]
            error, allowed = codec.deviation(packed(kept, name), live)
            # Other programs round otherwise, beside the largest numbers of a batch.
            allowed = allowed + slack(setup) * max(float(np.abs(live).max()), 1e-6)
            found = found.worse(name, error, allowed)
        found = dataclasses.replace(found, records=found.records + len(rows))
    return found
