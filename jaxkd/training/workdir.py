"""The files of a run's folder, by fixed names.

`config.json`, `metrics.jsonl`, `summary.json`, `predictions.npz` and, when asked for,
`tb/`. Files that are replaced are written beside and renamed, so that a killed run
leaves the old or the new one, never half of one.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import logging
import math
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkd.training.config import differences, jsonable
from jaxkd.training.plan import Plan
from jaxkd.training.schema import ConfigError

logger = logging.getLogger("jaxkd")

# Settings that do not change what is trained.
_FREE = (
    "log",
    "checkpoint",
    "mesh",
    "train",
    "profile",
    "notes",
    "data.path",
    "data.regions",
    "data.workers",
    "data.on_error",
    "data.options.cache",
)
# How long a file of process 0 may take to appear to the others.
_VISIBLE_SECONDS = 60
_PACKAGES = ("jaxkd", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that it is there wholly or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; NaN and infinities become null."""
    text = json.dumps(finite_or_none(value), indent=2, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def finite_or_none(value: Any) -> Any:
    """Replaces NaN and infinities by None, and NumPy scalars by Python's."""
    if isinstance(value, Mapping):
        return {k: finite_or_none(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_revision() -> str | None:
    """The revision of the source tree, with `+changes` if it is modified."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        return revision + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_device() -> str:
    """The devices of the run in words, e.g. `8 x cpu (simulated on one host)`."""
    devices, processes = jax.devices(), jax.process_count()
    words = f"{len(devices)} x {devices[0].device_kind}"
    if processes > 1:
        words += f" in {processes} processes"
    elif devices[0].platform == "cpu" and len(devices) > 1:
        words += " (simulated on one host)"
    return words


def _without(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A config without some keys, which may be paths (`"data.path"`)."""
    heads = {key.partition(".")[0] for key in keys}
    result = {}
    for name, value in config.items():
        inner = [k.partition(".")[2] for k in keys if k.partition(".")[0] == name]
        if name not in heads:
            result[name] = value
        elif "" not in inner and isinstance(value, Mapping):
            result[name] = _without(value, inner)
    return result


def import_tensorboard() -> Any:
    """Imports tensorboardX.

    Raises:
      ImportError: it is not installed; the message names the extra.
    """
    try:
        import tensorboardX
    except ImportError as error:
        raise ImportError("needs tensorboardX: pip install 'jaxkd[logging]'") from error
    return tensorboardX


class Workdir:
    """A run's folder. Only process 0 writes.

    Args:
      path: the folder; made if missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self.writes = jax.process_index() == 0

    def check(self, plan: Plan, *, free: Sequence[str] = ()) -> None:
        """Checks that the folder is this plan's, or that nothing began in it yet.

        Settings that leave the training numbers as they are may differ: where the
        data lie and who reads them, logging, checkpointing and the mesh. So may the
        stored targets of stages that did not begin.

        Args:
          plan: the plan of the command.
          free: further keys that may differ, e.g. `("evaluation",)`.

        Raises:
          ConfigError: the folder holds a run of another config; the line names the
            keys that differ.
        """
        file = self.path / "config.json"
        if not (file.exists() and self._has_results()):
            return
        old = self._read(file, "config")["config"]
        new = jsonable(dataclasses.asdict(plan))
        keys = (*_FREE, *self._free_targets(plan), *free)
        changes = differences(_without(old, keys), _without(new, keys))
        if changes:
            shown = "; ".join(changes[:4]) + ("; ..." if len(changes) > 4 else "")
            raise ConfigError(
                f"--workdir: {self.path} holds a run of another config "
                f"({shown}); take another --workdir or undo the change"
            )

    def claim(self, plan: Plan) -> None:
        """Checks the folder and makes it this plan's: writes `config.json`.

        Raises:
          ConfigError: see `check`; or the folder cannot be written.
        """
        self.check(plan)
        if not self.writes:
            return
        record = {
            "config": dataclasses.asdict(plan),
            "versions": versions(),
            "git_revision": git_revision(),
        }
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "config.json", record)
        except OSError as error:
            raise ConfigError(
                f"--workdir: cannot write to {self.path}: {error.strerror}"
            ) from error

    def claimed(self, plan: Plan) -> bool:
        """Whether process 0 has made the folder this plan's.

        The others may have to wait: a network file system may show a new file late.
        """
        file = self.path / "config.json"
        wanted = jsonable(dataclasses.asdict(plan))
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while True:
            if file.exists() and self._read(file, "config")["config"] == wanted:
                return True
            if self.writes or time.monotonic() > deadline:
                return False
            time.sleep(0.1)

    def progress(self) -> tuple[list[str], list[str]]:
        """The finished stages and the saved steps, which all processes must see."""
        stages = [s["name"] for s in self.summary().get("stages", ())]
        saved = self.path.glob("checkpoints/*/[0-9]*")
        return stages, sorted(f"{p.parent.name}/{p.name}" for p in saved)

    def _free_targets(self, plan: Plan) -> list[str]:
        """What may change of stored targets: all, or where they lie."""
        keys = []
        for name in plan.stages:
            begun = any(self.checkpoints(name).glob("[0-9]*"))
            parts = (".path", ".shard_mebibytes") if begun else ("",)
            keys += [f"stages.{name}.targets{part}" for part in parts]
        return keys

    def _has_results(self) -> bool:
        """Whether a stage was begun: whether a checkpoint or a summary is there."""
        saved = self.path.glob("checkpoints/*/[0-9]*")
        return (self.path / "summary.json").exists() or any(saved)

    def summary(self) -> dict[str, Any]:
        """The summary so far; empty if there is none."""
        file = self.path / "summary.json"
        return self._read(file, "stages", "results") if file.exists() else {}

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replaces `summary.json`."""
        if self.writes:
            write_json(self.path / "summary.json", summary)

    def predictions(self) -> dict[str, np.ndarray]:
        """The arrays of `predictions.npz`; empty if there is none that can be read."""
        file = self.path / "predictions.npz"
        if not file.exists():
            return {}
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            logger.warning("%s is damaged (%s) and is written anew", file, error)
            return {}

    def add_predictions(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds arrays to `predictions.npz`, replacing those of the same names."""
        if self.writes:
            merged: dict[str, Any] = {**self.predictions(), **arrays}
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **merged)
            write_atomically(self.path / "predictions.npz", buffer.getvalue())

    def checkpoints(self, stage: str) -> Path:
        """The folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    def profile(self, stage: str) -> Path:
        """The folder of a stage's trace."""
        return self.path / "profile" / stage

    def _read(self, file: Path, *keys: str) -> dict[str, Any]:
        try:
            value = json.loads(file.read_text())
            missing = [k for k in keys if k not in value]
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"--workdir: cannot read {file}: {error}") from error
        if missing:
            raise ConfigError(
                f"--workdir: {file} is damaged: it has no {missing[0]!r}; restore it "
                "or take another --workdir"
            )
        return value


class MetricsWriter:
    """Appends records to `metrics.jsonl` and, if asked, to TensorBoard.

    Records later than where a run resumes are dropped first, so that a step never
    appears twice.

    Args:
      workdir: the run's folder.
      tensorboard: also write `tb/`.

    Raises:
      ImportError: TensorBoard is wanted and tensorboardX is not installed.
    """

    def __init__(self, workdir: Workdir, *, tensorboard: bool = False):
        self._path = workdir.path / "metrics.jsonl"
        self._file = None
        self._board = None
        self._enabled = workdir.writes
        self._board_path = workdir.path / "tb"
        self._tensorboard = import_tensorboard() if tensorboard else None

    def rewind(self, stage: str, step: int, *, finished: list[str]) -> None:
        """Keeps the records of `finished` stages, and of `stage` up to `step`."""
        if not self._enabled:
            return
        if self._tensorboard is not None:
            if self._board is not None:
                self._board.close()
            # One folder per stage, so that dropping later steps spares other stages.
            self._board = self._tensorboard.SummaryWriter(
                str(self._board_path / stage), purge_step=step + 1
            )
        if not self._path.exists():
            return
        if self._file is not None:
            # The file is replaced below; an open handle would write to the old one.
            self._file.close()
            self._file = None
        kept = []
        for line in self._path.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed while writing
            at_stage = record["stage"]
            if at_stage in finished or (at_stage == stage and record["step"] <= step):
                kept.append(line)
        write_atomically(self._path, b"".join(line + b"\n" for line in kept))

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record."""
        if not self._enabled:
            return
        if self._file is None:
            self._file = open(self._path, "a")  # noqa: SIM115
        self._file.write(json.dumps(finite_or_none(record), allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            step = int(record["step"])
            for key, value in {**record, **record.get("terms", {})}.items():
                if isinstance(value, int | float) and key not in ("step", "epoch"):
                    self._board.add_scalar(f"{record['kind']}/{key}", value, step)

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
