"""Labels of random crops for FKD: `--mode=label` with `targets.regions`.

They are written as other stored targets are, a row for each record, and become one
`regions.npz` at the end, which `config.data.regions` of another run reads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.data import DamagedFileError, pipeline
from jaxkd.data.region_answers import draw_regions, region_probabilities
from jaxkd.data.regions import Regions, read_regions, region_fields, stream_regions
from jaxkd.data.target_writer import TargetsWriter
from jaxkd.data.targets import REMEDY, Manifest, Targets, open_targets
from jaxkd.numerics import compress_labels
from jaxkd.training.label_writing import InOrder, write_answers
from jaxkd.training.network import Variables
from jaxkd.training.placement import place
from jaxkd.training.schema import ConfigError
from jaxkd.training.sections import TargetsPlan
from jaxkd.training.setup import Setup
from jaxkd.training.sharding import batch_parts, put_batch
from jaxkd.training.signals import StopSignal
from jaxkd.training.stage import Stage
from jaxkd.training.target_files import REGIONS, Verified, slack

_SAMPLE = 8
Crops = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class RegionLabels:
    """What the teacher of a stage says of random crops of all training records.

    Attributes:
      setup: the objects of the run.
      stage: whose teacher is asked.
      variables: the teacher's.
    """

    setup: Setup
    stage: Stage
    variables: Mapping[str, Variables]

    def write(self, folder: Path, identity: dict[str, Any], stop: StopSignal) -> None:
        """Writes `regions.npz`, as `config.data.regions` reads it, and a manifest.

        Args:
          folder: there is nothing yet, or what an interrupted call left beside it.
          identity: for the manifest.
          stop: read between batches.

        Raises:
          Stopped: a signal came; whole files are kept and not written again.
          ValueError: an answer is not finite.
          OSError: the folder cannot be written.
        """
        info, records = self.setup.train.info, len(self.setup.train)
        label_format = self._plan.label_format
        shard_bytes = self._plan.shard_mebibytes * 2**20
        fields = region_fields(self._regions, label_format, info.num_classes)
        constants = {
            "label_format": label_format,
            "num_classes": info.num_classes,
            "image_shape": info.image_shape,
        }
        rows = Manifest(identity=identity, records=records, views=1, fields=fields)
        writer = TargetsWriter(folder, rows, shard_bytes=shard_bytes)
        try:
            draw, ask = self._draw(), self._ask()

            @jax.jit
            def encode(crops: Crops, probabilities: jax.Array) -> dict[str, jax.Array]:
                index, probability = compress_labels(
                    probabilities, label_format=label_format
                )
                names = ("coords", "flip", "index", "probability")
                return dict(zip(names, (*crops, index, probability), strict=True))

            def answer(batch: pipeline.Batch, view: int) -> dict[str, jax.Array]:
                del view  # each record has one row, with all its crops
                crops = draw(batch["index"])
                return encode(crops, ask(batch, crops))

            write_answers(
                writer,
                answer,
                InOrder(self.setup.train, batch_size=self._records_per_call),
                records=records,
                stage=self.stage.name,
                workers=self.setup.plan.data.workers,
                stop=stop,
                each=self._regions,
            )

            def export(path: Path, targets: Targets) -> None:
                stream_regions(
                    path,
                    lambda first, last: targets.read(0, np.arange(first, last)),
                    records=records,
                    fields=fields,
                    constants=constants,
                )

            manifest = dataclasses.replace(rows, views=self._regions, fields={})
            writer.export(REGIONS, manifest, export)
        finally:
            writer.close()

    def check_files(self, folder: Path) -> None:
        """Checks every byte.

        Raises:
          DamagedFileError: the file is missing, or is not what was written.
        """
        open_targets(folder).check_files()

    def verify(self, folder: Path, *, seed: int = 0) -> Verified:
        """Compares the labels of some records with what the teacher says now.

        Args:
          folder: where the labels lie.
          seed: of the sample.

        Raises:
          DamagedFileError: the file is damaged, or of other regions.
        """
        stored, size = self._read(folder), self._records_per_call
        rows = np.random.default_rng(seed).permutation(len(stored.flip))[:_SAMPLE]
        found = Verified(records=stored.flip[rows].size)
        draw, ask = self._draw(), self._ask()
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            filled = np.pad(part, (0, size - len(part)), mode="edge")
            batch = pipeline.read_records(self.setup.train, filled)
            # Of the stored boxes: rounded otherwise they might be a pixel larger.
            boxes = {"coords": stored.coords[filled], "flip": stored.flip[filled]}
            crops = tuple(put_batch(boxes, self.setup.mesh).values())
            fresh = np.asarray(ask(batch, crops))[: len(part)]
            error = _deviation(stored.index[part], stored.probability[part], fresh)
            allowed = np.full(len(part), slack(self.setup))
            found = found.worse("the labels of regions", error, allowed)
            coords, flip = (np.asarray(a)[: len(part)] for a in draw(batch["index"]))
            moved = np.abs(stored.coords[part] - coords).max((1, 2))
            moved = moved + (stored.flip[part] != flip).any(1)
            allowed = np.full(len(part), 1e-6)
            found = found.worse("the boxes of regions", moved, allowed)
        return found

    @property
    def _plan(self) -> TargetsPlan:
        if self.stage.plan.targets is None:
            raise ConfigError(
                f"config.stages.{self.stage.name}.targets: there are none"
            )
        return self.stage.plan.targets

    @property
    def _regions(self) -> int:
        if self._plan.regions is None:
            raise ConfigError(
                f"config.stages.{self.stage.name}.targets.regions: there are none"
            )
        return self._plan.regions

    @property
    def _records_per_call(self) -> int:
        """Records whose crops fill about one training batch, on all devices."""
        parts = batch_parts(self.setup.mesh)
        size = self.setup.plan.data.batch_size
        return parts * max(1, size // (parts * self._regions))

    def _read(self, folder: Path) -> Regions:
        stored = read_regions(folder / REGIONS)
        expected = (len(self.setup.train), self._regions)
        if stored.flip.shape != expected:
            raise DamagedFileError(
                folder / REGIONS,
                f"it has {stored.flip.shape[1]} regions of {stored.flip.shape[0]} "
                f"records and should have {expected[1]} of {expected[0]}",
                REMEDY,
            )
        return stored

    def _draw(self) -> Callable[[np.ndarray], Crops]:
        """From numbers of records `[b]` to their boxes and flips.

        A program of its own: fused with others, a box might be rounded otherwise where
        it is used than where it is stored.
        """
        setup, seed = self.setup, self._plan.seed
        seed = setup.plan.seed if seed is None else seed
        draw = functools.partial(
            draw_regions,
            jax.random.key(seed),
            regions=self._regions,
            image_shape=setup.train.info.image_shape,
        )
        every = jax.jit(jax.vmap(draw))

        def drawn(index: np.ndarray) -> Crops:
            return every(put_batch({"index": index}, setup.mesh)["index"])

        return drawn

    def _ask(self) -> Callable[[pipeline.Batch, Crops], jax.Array]:
        """From images and crops `[b, ...]` to probabilities `[b, regions, classes]`."""
        setup, augment = self.setup, self.setup.plan.data.augment
        placed, on_mesh = place(setup, self.stage, self.variables)
        (teacher,) = placed.teachers
        height, width, _ = setup.train.info.image_shape
        chunk = max(1, setup.plan.data.batch_size // self._records_per_call)

        @jax.jit
        def answer(
            variables: Variables, images: jax.Array, coords: jax.Array, flip: jax.Array
        ) -> jax.Array:
            def predict(crops: jax.Array) -> jax.Array:
                labels = jnp.zeros(len(crops), jnp.int32)
                seen = augment.evaluate({"image": crops, "label": labels})["image"]
                return teacher.apply(variables, seen, train=False, key=None)[0].logits

            return region_probabilities(
                predict,
                images,
                coords,
                flip,
                size=(height, width),
                chunk=min(chunk, self._regions),
            )

        def ask(batch: pipeline.Batch, crops: Crops) -> jax.Array:
            images = put_batch({"image": batch["image"]}, setup.mesh)["image"]
            return answer(on_mesh[0], images, *crops)

        return ask


def _deviation(
    index: np.ndarray, probability: np.ndarray, fresh: np.ndarray
) -> np.ndarray:
    """How far stored labels are from fresh probabilities, `[b]`.

    The kept classes must have the probabilities that are stored, and these must be the
    largest ones: two classes of equal probability may change places.

    Args:
      index: the classes kept, `[b, regions, k]`.
      probability: theirs.
      fresh: of all classes, `[b, regions, classes]`.
    """
    there = np.take_along_axis(fresh, index.astype(np.int64), axis=-1)
    largest = -np.sort(-fresh, axis=-1)[..., : index.shape[-1]]
    kept = -np.sort(-probability.astype(np.float32), axis=-1)
    error = np.maximum(np.abs(probability - there), np.abs(kept - largest))
    return error.max((1, 2))
