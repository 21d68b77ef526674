"""The stored targets of a run's stages: where they lie, and whether they still fit."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkd
from jaxkd.data.fingerprint import tree_fingerprint
from jaxkd.data.regions import RegionSource
from jaxkd.data.source import DamagedFileError
from jaxkd.data.targets import (
    MANIFEST,
    REMEDY,
    Manifest,
    Targets,
    open_targets,
    read_manifest,
)
from jaxkd.training import sharding
from jaxkd.training.config import differences, jsonable
from jaxkd.training.network import Variables
from jaxkd.training.paths import path_name
from jaxkd.training.schema import ConfigError
from jaxkd.training.setup import Setup
from jaxkd.training.stage import Stage
from jaxkd.training.stored import StoredTeachers
from jaxkd.training.workdir import Workdir, write_json

REGIONS = "regions.npz"
# In a workdir: which labels of regions its stages began with.
_LABELS = "regions.json"
# What a manifest says of the targets' teachers.
_TEACHERS = "teachers"


def targets_folder(workdir: Workdir, stage: Stage) -> Path:
    """Where the targets of a stage lie."""
    plan = stage.plan.targets
    if plan is None or plan.path is None:
        return workdir.path / "targets" / stage.name
    return Path(plan.path)


def identity(setup: Setup, stage: Stage) -> dict[str, Any]:
    """All that a stage's targets depend on, but for the teachers, as plain JSON."""
    plan = stage.plan.targets
    if plan is None:
        raise ConfigError(f"config.stages.{stage.name}.targets: there are none")
    targets = dataclasses.asdict(plan)
    # Where they lie and in how large pieces does not matter.
    del targets["path"], targets["shard_mebibytes"]
    key = stage.augmentation_key(setup.seeds.keys())
    return jsonable(
        {
            "code_version": jaxkd.__version__,
            "data": setup.fingerprint,
            "augment": dataclasses.asdict(setup.plan.data.augment),
            "targets": targets,
            "precision": setup.plan.precision,
            # Tells seeds, stages and kinds of random numbers apart.
            "draws": np.asarray(jax.random.bits(key, (2,))).tolist(),
        }
    )


def teachers_identity(
    setup: Setup, stage: Stage, load: Callable[[str], Variables]
) -> dict[str, Any]:
    """What tells the teachers of a stage from others, as plain JSON.

    Args:
      setup: the objects of the run.
      stage: the stage.
      load: returns the variables of a network; none are kept.
    """
    return {
        f"teacher{i}": {
            "network": jsonable(
                dataclasses.asdict(setup.plan.networks[teacher.name]) | {"frozen": None}
            ),
            "sha256": tree_fingerprint(load(teacher.name)),
        }
        for i, teacher in enumerate(stage.teachers)
    }


def check_identity(
    stage: Stage, folder: Path, manifest: Manifest, wanted: Mapping[str, Any]
) -> None:
    """Refuses targets that were written for something else.

    Args:
      stage: the stage.
      folder: where the targets lie.
      manifest: theirs.
      wanted: those parts of the identity that are to be compared.

    Raises:
      ConfigError: one line that names what differs and the remedy.
    """
    stored = {k: v for k, v in manifest.identity.items() if k in wanted}
    changes = differences(stored, dict(wanted), "")
    if not changes:
        return
    shown = "; ".join(c.removeprefix(".") for c in changes[:3])
    shown = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", shown)
    shown += "; ..." if len(changes) > 3 else ""
    what = "another teacher" if _TEACHERS in wanted else "other settings"
    raise ConfigError(
        f"config.stages.{stage.name}.targets: {folder} was written for {what} "
        f"({shown}); restore that, or delete the folder and write it anew with "
        "--mode=label"
    )


def find_targets(setup: Setup, stage: Stage, workdir: Workdir) -> Path:
    """The folder of a stage's targets, after everything but the teachers is checked.

    Raises:
      ConfigError: they are not written yet, or not for this data and these settings.
      DamagedFileError: the manifest is damaged.
    """
    folder = targets_folder(workdir, stage)
    here = f"config.stages.{stage.name}.targets"
    if not (folder / MANIFEST).exists():
        raise ConfigError(
            f"{here}: there are none at {folder}; run the same command with "
            "--mode=label first, or leave targets out"
        )
    check_identity(
        stage, folder, read_manifest(folder / MANIFEST), identity(setup, stage)
    )
    return folder


def check_targets(setup: Setup, workdir: Workdir) -> None:
    """Checks the targets of all stages that are still to be trained.

    Raises:
      ConfigError: some are not written, not for this run, or of no use to a stage.
      DamagedFileError: some are damaged.
    """
    finished = [s["name"] for s in workdir.summary().get("stages", ())]
    for stage in setup.stages:
        plan = stage.plan.targets
        if stage.name in finished:
            continue
        check_region_labels(setup, stage, workdir)
        if plan is None:
            continue
        if plan.regions is not None:
            file = targets_folder(workdir, stage) / REGIONS
            raise ConfigError(
                f"config.stages.{stage.name}.targets.regions: labels of regions are "
                "written by --mode=label and read by another run, with "
                f"--config.data.regions={file} and the method 'fkd'"
            )
        open_targets(find_targets(setup, stage, workdir))


def check_region_labels(setup: Setup, stage: Stage, workdir: Workdir) -> None:
    """Refuses other labels of regions than those that a stage began with.

    `config.data.regions` may move in a workdir, so the path does not tell.

    Args:
      setup: the objects of the run.
      stage: the stage.
      workdir: the run's folder; `regions.json` has the SHA-256 of the labels that each
        stage began with.

    Raises:
      ConfigError: they are others now.
    """
    if not isinstance(setup.train, RegionSource) or not _begun(stage, workdir):
        return
    before = _known_labels(workdir).get(stage.name)
    now = tree_fingerprint(vars(setup.train.regions))
    if before not in (None, now):
        raise ConfigError(
            f"config.data.regions: {setup.plan.data.regions} has other labels than "
            f"those that stage {stage.name!r} began with; restore them, or take "
            "another --workdir"
        )


def note_region_labels(setup: Setup, stage: Stage, workdir: Workdir) -> None:
    """Notes with which labels of regions a stage begins; see `check_region_labels`."""
    if (
        not isinstance(setup.train, RegionSource)
        or _begun(stage, workdir)
        or not workdir.writes
    ):
        return
    now = tree_fingerprint(vars(setup.train.regions))
    workdir.path.mkdir(parents=True, exist_ok=True)
    write_json(workdir.path / _LABELS, {**_known_labels(workdir), stage.name: now})


def _begun(stage: Stage, workdir: Workdir) -> bool:
    return any(workdir.checkpoints(stage.name).glob("[0-9]*"))


def _known_labels(workdir: Workdir) -> dict[str, str]:
    file = workdir.path / _LABELS
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DamagedFileError(
            file, str(error), "delete it, if the labels are those of before"
        ) from error


@dataclasses.dataclass(frozen=True)
class StageTargets:
    """What a stage reads instead of running its teachers.

    Attributes:
      files: to be given to `pipeline.train_batches` as `extra`.
      constants: what takes the place of the teachers' variables in a step, on all
        devices.
    """

    files: Targets
    constants: tuple[Variables, ...]


def load_targets(
    setup: Setup, stage: Stage, workdir: Workdir, load: Callable[[str], Variables]
) -> StageTargets | None:
    """Opens the targets of a stage; None for a stage whose teachers run.

    Also checks that labels of regions are those that the stage began with.

    Args:
      setup: the objects of the run.
      stage: the stage.
      workdir: the run's folder.
      load: returns the variables of a teacher, to be compared and dropped.

    Raises:
      ConfigError: they are not written yet, or for something else.
      DamagedFileError: they are damaged.
    """
    check_region_labels(setup, stage, workdir)
    note_region_labels(setup, stage, workdir)
    if stage.stored is None:
        return None
    folder = find_targets(setup, stage, workdir)
    targets = open_targets(folder)
    teachers = {_TEACHERS: teachers_identity(setup, stage, load)}
    check_identity(stage, folder, targets.manifest, teachers)
    constants = read_constants(stage, stage.stored, targets)
    constants = jax.device_put(constants, sharding.replicated(setup.mesh))
    return StageTargets(targets, constants)


def read_constants(
    stage: Stage, stored: StoredTeachers, targets: Targets
) -> tuple[Variables, ...]:
    """The layers of its teachers that a stage's method reads, out of a folder.

    Args:
      stage: the stage.
      stored: what it reads.
      targets: the folder, which was written for the same teachers, but may have been
        written for another method.

    Returns:
      For each teacher what `constants_of` returns, as NumPy arrays.

    Raises:
      ConfigError: the method reads layers that are not stored.
      DamagedFileError: a file is damaged.
    """
    if targets.manifest.fields != stored.fields:
        raise DamagedFileError(
            targets.path / MANIFEST, "its fields are not those of its identity", REMEDY
        )
    arrays = targets.constants()
    shapes = constants_of(stage, stored)
    wanted = {path_name(p): leaf.shape for p, leaf in jax.tree.leaves_with_path(shapes)}
    remedy = "delete the folder and write it anew with --mode=label"
    here = f"config.stages.{stage.name}.targets"
    for name, shape in wanted.items():
        if name not in arrays:
            missing = [n for n in wanted if n not in arrays]
            raise ConfigError(
                f"{here}: {targets.path} was written for another method: this one also "
                f"reads {', '.join(missing)} of its teachers, which is not stored; "
                f"{remedy}"
            )
        if arrays[name].shape != shape:
            raise ConfigError(
                f"{here}: {targets.path} has {name} of shape {arrays[name].shape} and "
                f"the teacher has {shape}; {remedy}"
            )
    return jax.tree.map_with_path(lambda path, _: arrays[path_name(path)], shapes)


def constants_of(
    stage: Stage,
    stored: StoredTeachers,
    variables: Mapping[str, Variables] | None = None,
) -> tuple[Variables, ...]:
    """What the teachers of a stage have that is the same for all images.

    Args:
      stage: the stage.
      stored: what is stored of its teachers.
      variables: theirs; None for shapes alone.
    """

    def outputs(variables: tuple[Variables, ...]) -> tuple[Variables, ...]:
        images = jnp.zeros((1, *stored.input_shape), jnp.float32)
        return stored.constants(
            [
                teacher.apply(v, images, train=False, key=None)[0]
                for teacher, v in zip(stage.teachers, variables, strict=True)
            ]
        )

    if variables is not None:
        return jax.jit(outputs)(tuple(variables[t.name] for t in stage.teachers))
    key = jax.eval_shape(jax.random.key, 0)
    abstract = tuple(jax.eval_shape(t.init, key) for t in stage.teachers)
    return jax.eval_shape(outputs, abstract)


@dataclasses.dataclass(frozen=True)
class Verified:
    """How far a sample of stored answers is from what the live teachers say.

    Attributes:
      records: size of the sample.
      error: the difference that is largest beside what it may be.
      allowed: what it may be: rounding of the format, and of another program.
      where: the array it is in.
    """

    records: int = 0
    error: float = 0.0
    allowed: float = 0.0
    where: str = ""

    @property
    def excess(self) -> float:
        """Above 1 if the stored answers are not the live teachers'."""
        return self.error / self.allowed if self.allowed else 0.0

    def worse(self, where: str, error: np.ndarray, allowed: np.ndarray) -> Verified:
        """The worse of this and of further records."""
        ratios = np.nan_to_num(error / allowed, nan=np.inf)
        i = int(np.argmax(ratios))
        if self.allowed and ratios[i] <= self.excess:
            return self
        return Verified(self.records, float(error[i]), float(allowed[i]), where)


def slack(setup: Setup) -> float:
    """How far one teacher's answers may differ from program to program, as a share."""
    return 1e-3 if setup.plan.precision == "float32" else 3e-2
