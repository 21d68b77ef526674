"""`--mode=label`: shows the augmented training images to the teachers, once.

Stages that the teachers need are trained first. Targets that are there already are
compared with what the teachers say now.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from jaxkd.data import DamagedFileError, Source, pipeline
from jaxkd.data.target_writer import TargetsWriter
from jaxkd.data.targets import (
    MANIFEST,
    Manifest,
    Targets,
    open_targets,
    read_manifest,
)
from jaxkd.training import loop, sharding
from jaxkd.training.network import Variables
from jaxkd.training.paths import path_name
from jaxkd.training.placement import place
from jaxkd.training.region_labelling import verify_regions, write_region_labels
from jaxkd.training.schema import ConfigError, one_line
from jaxkd.training.setup import Setup
from jaxkd.training.signals import Stopped, StopSignal
from jaxkd.training.stage import Stage
from jaxkd.training.stored import StoredTeachers, packed
from jaxkd.training.target_files import (
    Verified,
    check_identity,
    constants_of,
    find_targets,
    identity,
    slack,
    targets_folder,
    teachers_identity,
)
from jaxkd.training.workdir import Workdir

logger = logging.getLogger("jaxkd")

_SAMPLED_VIEWS = 3


class TargetsDiffer(Exception):
    """Stored targets are not what the teachers say; one line for the user."""


def label(
    setup: Setup, workdir: Workdir, *, command: str, stop: StopSignal
) -> Iterator[str]:
    """Writes the targets of every stage that has some, or checks them.

    Args:
      setup: the objects of the run.
      workdir: its folder.
      command: for the summary.
      stop: read between batches.

    Yields:
      A line for each stage.

    Raises:
      ConfigError: no stage has targets, or those that are there are for other settings.
      TargetsDiffer: those that are there are not what the teachers say.
      Stopped: a signal came; what is whole is kept.
    """
    stages = [stage for stage in setup.stages if stage.plan.targets is not None]
    if not stages:
        raise ConfigError(
            "--mode=label: no stage has targets; set e.g. "
            f"--config.stages.{setup.stages[-1].name}.targets.views=1"
        )
    if jax.process_count() > 1:
        raise ConfigError(
            f"--mode=label: one process labels, with all its devices, and there are "
            f"{jax.process_count()}; training may read the targets in any number"
        )
    for stage in stages:
        needed = [earlier.name for earlier in _needed(setup, stage)]
        if not {*needed} <= {*_finished(workdir)}:
            loop.run(setup, workdir, command=command, stop=stop, only=needed)
        yield _write_or_check(setup, stage, workdir, stop)


def _finished(workdir: Workdir) -> list[str]:
    return [stage["name"] for stage in workdir.summary().get("stages", ())]


def _needed(setup: Setup, stage: Stage) -> list[Stage]:
    """The stages before this one that its teachers come from, in order."""
    wanted = {teacher.name for teacher in stage.teachers}
    needed: list[Stage] = []
    for earlier in reversed(setup.stages[: setup.stages.index(stage)]):
        if wanted & {*earlier.learners}:
            needed.insert(0, earlier)
            wanted |= {*(t.name for t in earlier.teachers), *earlier.starts}
    return needed


def _write_or_check(
    setup: Setup, stage: Stage, workdir: Workdir, stop: StopSignal
) -> str:
    """Returns a line that says what was done."""
    folder, before = targets_folder(workdir, stage), _before(setup, stage)
    finished = [name for name in _finished(workdir) if name in before]
    variables = {
        teacher.name: loop.load_variables(setup, workdir, teacher.name, finished)
        for teacher in stage.teachers
    }
    teachers = teachers_identity(setup, stage, variables.__getitem__)
    names = ", ".join(variables)
    there = (folder / MANIFEST).exists()
    if there:
        find_targets(setup, stage, workdir)
        manifest = read_manifest(folder / MANIFEST)
        check_identity(stage, folder, manifest, {"teachers": teachers})
    else:
        whole = {**identity(setup, stage), "teachers": teachers}
        try:
            _write(setup, stage, variables, folder, whole, stop)
        except DamagedFileError:
            raise
        except (ValueError, FileExistsError) as error:
            here = f"config.stages.{stage.name}.targets"
            raise ConfigError(f"{here}: {one_line(error)}") from error
    if stage.stored is None:
        verified = verify_regions(setup, stage, variables, folder)
    else:
        targets = open_targets(folder)
        if there:
            targets.check_files()
        verified = verify(setup, stage, variables, targets)
    if verified.excess > 1:
        raise TargetsDiffer(
            f"{folder}: {verified.where} differs by {verified.error:.3g} from what "
            f"{names} says now, and {verified.allowed:.3g} is allowed; delete the "
            "folder and write it anew with --mode=label"
        )
    manifest = read_manifest(folder / MANIFEST)
    return (
        f"{stage.name}: {'checked' if there else 'wrote'} {_describe(manifest)} of "
        f"{names} in {folder}; {verified.records} of them differ from the live answers "
        f"by at most {verified.error:.2g} ({verified.allowed:.2g} allowed)"
    )


def _before(setup: Setup, stage: Stage) -> set[str]:
    return {s.name for s in setup.stages[: setup.stages.index(stage)]}


def _write(
    setup: Setup,
    stage: Stage,
    variables: Mapping[str, Variables],
    folder: Path,
    identity: dict[str, Any],
    stop: StopSignal,
) -> None:
    if stage.stored is None:
        write_region_labels(setup, stage, variables, folder, identity)
    else:
        write_views(setup, stage, variables, folder, identity, stop=stop)


def _describe(manifest: Manifest) -> str:
    """What a folder holds, in words."""
    stored, files = manifest.records * manifest.views, len(manifest.shards)
    each = manifest.record_bytes or round(manifest.nbytes / stored)
    return (
        f"{stored} answers ({manifest.views} for each of {manifest.records} records, "
        f"{each} bytes each, {manifest.nbytes / 2**20:.3g} MiB in {files} "
        f"file{'s' * (files > 1)})"
    )


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
    assert stage.stored is not None
    return stage.stored


class _Views:
    """Every record in order, once for each view, in batches of one size."""

    def __init__(self, source: Source, *, batch_size: int, views: int):
        self._source, self._batch_size = source, batch_size
        self.per_view = -(-len(source) // batch_size)
        self._views = views

    def __len__(self) -> int:
        return self._views * self.per_view

    def rows(self, step: int) -> np.ndarray:
        """The records of a batch; the last batch of a view may be shorter."""
        first = step % self.per_view * self._batch_size
        return np.arange(first, min(first + self._batch_size, len(self._source)))

    def __getitem__(self, step: int) -> pipeline.Batch:
        rows = self.rows(step)
        # Copies of the last record fill up, so that one program serves all.
        filled = np.pad(rows, (0, self._batch_size - len(rows)), mode="edge")
        return pipeline.read_records(self._source, filled.astype(np.int32))


def write_views(
    setup: Setup,
    stage: Stage,
    variables: Mapping[str, Variables],
    folder: Path,
    identity: dict[str, Any],
    *,
    stop: StopSignal,
) -> Targets:
    """Writes what the teachers say of all views of all training records.

    Args:
      setup: the objects of the run.
      stage: whose teachers are asked.
      variables: theirs.
      folder: there is nothing yet, or what an interrupted call left beside it.
      identity: for the manifest.
      stop: read between batches.

    Raises:
      Stopped: a signal came; whole files are kept and not written again.
      ValueError: an answer is not finite in its format.
    """
    from jaxkd.data._iterator import BatchIterator

    stored, plan = _stored(stage), setup.plan
    records, views = len(setup.train), stored.plan.views
    batches = _Views(setup.train, batch_size=plan.data.batch_size, views=views)
    manifest = Manifest(
        identity=identity, records=records, views=views, fields=stored.fields
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    writer = TargetsWriter(
        folder, manifest, shard_bytes=stored.plan.shard_mebibytes * 2**20
    )
    answers = make_answers(setup, stage, variables)
    view, within = divmod(writer.position, records)
    step = view * batches.per_view + within // plan.data.batch_size
    skip = within % plan.data.batch_size
    if writer.position:
        logger.info("%s: %d answers are there", stage.name, writer.position)
    iterator = BatchIterator(batches, workers=plan.data.workers)
    iterator.set_state({"next_step": step})

    def write(step: int, answer: dict[str, jax.Array], skip: int) -> int:
        count = len(batches.rows(step))
        writer.write({k: np.asarray(v)[skip:count] for k, v in answer.items()})
        return count - skip

    bar = tqdm(
        total=records * views,
        initial=writer.position,
        desc=f"{stage.name}: targets",
        unit="image",
        disable=None,
    )
    try:
        with bar:
            waiting: tuple[int, dict[str, jax.Array], int] | None = None
            for number, batch in enumerate(iterator, start=step):
                asked = answers.ask(batch, number // batches.per_view)
                asked = answers.encode(asked)
                # The devices work on this batch while the one before is written.
                if waiting is not None:
                    bar.update(write(*waiting))
                waiting, skip = (number, asked, skip), 0
                if stop.received:
                    raise Stopped(
                        f"stopped by {stop.received} while labelling for stage "
                        f"{stage.name!r}, {writer.position} of {records * views} "
                        "answers are kept; run the same command again to continue"
                    )
            if waiting is not None:
                bar.update(write(*waiting))
        constants = constants_of(stage, stored, variables)
        return writer.finish(
            {
                path_name(path): np.asarray(leaf, np.float32)
                for path, leaf in jax.tree.leaves_with_path(constants)
            }
        )
    finally:
        iterator.close()
        writer.close()


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
