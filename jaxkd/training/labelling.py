"""`--mode=label`: shows the augmented training images to the teachers, once.

Stages that the teachers need are trained first. Targets that are there already are
compared with what the teachers say now.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax

from jaxkd.data import DamagedFileError
from jaxkd.data.targets import MANIFEST, Manifest, read_manifest
from jaxkd.training import loop
from jaxkd.training.region_labelling import RegionLabels
from jaxkd.training.schema import ConfigError, one_line
from jaxkd.training.setup import Setup
from jaxkd.training.signals import StopSignal
from jaxkd.training.stage import Stage
from jaxkd.training.target_files import (
    check_identity,
    find_targets,
    identity,
    targets_folder,
    teachers_identity,
)
from jaxkd.training.view_labelling import ViewLabels
from jaxkd.training.workdir import Workdir


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
    make = RegionLabels if stage.stored is None else ViewLabels
    labels = make(setup, stage, variables)
    there = (folder / MANIFEST).exists()
    if there:
        find_targets(setup, stage, workdir)
        manifest = read_manifest(folder / MANIFEST)
        check_identity(stage, folder, manifest, {"teachers": teachers})
        labels.check_files(folder)
    else:
        whole = {**identity(setup, stage), "teachers": teachers}
        try:
            labels.write(folder, whole, stop)
        except DamagedFileError:
            raise
        except (ValueError, FileExistsError) as error:
            here = f"config.stages.{stage.name}.targets"
            raise ConfigError(f"{here}: {one_line(error)}") from error
    verified = labels.verify(folder)
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


def _describe(manifest: Manifest) -> str:
    """What a folder holds, in words."""
    stored, files = manifest.records * manifest.views, len(manifest.shards)
    each = manifest.record_bytes or round(manifest.nbytes / stored)
    return (
        f"{stored} answers ({manifest.views} for each of {manifest.records} records, "
        f"{each} bytes each, {manifest.nbytes / 2**20:.3g} MiB in {files} "
        f"file{'s' * (files > 1)})"
    )
