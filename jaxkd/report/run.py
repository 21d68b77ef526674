"""What a run left in its folder, read for tables and pages.

A folder may be incomplete: a run that is still going or was stopped has no summary or
a partial one. Whatever is there is read, whatever is missing is noted for the page, and
only a folder without any trace of a run, or a file that is damaged, is an error.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Record = Mapping[str, Any]


_SUMMARY_PARTS = {
    "results": dict,
    "costs": dict,
    "by_seed": dict,
    "versions": dict,
    "data": dict,
    "stages": list,
    "seeds": list,
    "class_names": list,
    "notes": list,
}


class ReportError(ValueError):
    """A folder that cannot be reported; the text is one line and names the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The files of one run.

    Attributes:
      name: what to call the run: its folder's name.
      summary: `summary.json`, or an empty mapping.
      config: `config.json`, or an empty mapping.
      train: the training records of `metrics.jsonl`, in order, one per stage and step.
      evaluations: its evaluation records, one per stage, step and network.
      predictions: the arrays of `predictions.npz`, checked to belong together.
      notes: what is missing or odd, one sentence each.
    """

    name: str
    summary: Record
    config: Record
    train: tuple[Record, ...]
    evaluations: tuple[Record, ...]
    predictions: Mapping[str, np.ndarray]
    notes: tuple[str, ...]

    @property
    def task(self) -> str:
        """`"segmentation"` or `"classification"`; empty if nothing tells."""
        if "task" in self.summary:
            return str(self.summary["task"])
        if "truth" in self.predictions:
            flat = self.predictions["truth"].ndim == 1
            return "classification" if flat else "segmentation"
        return ""

    @property
    def status(self) -> str:
        """`"finished"`, or why not."""
        return str(self.summary.get("status", "unfinished"))

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of all networks in the order of the results; the last is the goal."""
        predicted = [
            key.partition("/")[2] for key in self.predictions if "prediction/" in key
        ]
        evaluated = [str(record.get("network")) for record in self.evaluations]
        names = [*self.summary.get("results", {}), *predicted, *evaluated]
        return tuple(dict.fromkeys(names))

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages: the finished, the logged, then the planned ones."""
        finished = [str(stage["name"]) for stage in self.summary.get("stages", [])]
        logged = [str(record["stage"]) for record in (*self.train, *self.evaluations)]
        return tuple(dict.fromkeys([*finished, *logged, *self.planned]))

    @property
    def planned(self) -> tuple[str, ...]:
        """Names of the stages of the config."""
        config = self.config.get("config", {})
        stages = config.get("stages", {}) if isinstance(config, Mapping) else {}
        return tuple(map(str, stages)) if isinstance(stages, Mapping) else ()


def read_run(workdir: Path) -> Run:
    """Reads a run's folder.

    Args:
      workdir: the folder.

    Returns:
      What is there, with notes on what is not.

    Raises:
      ReportError: no folder, nothing of a run in it, or a damaged file.
    """
    if not workdir.is_dir():
        raise ReportError(f"{workdir} is not a folder; give the --workdir of a run")
    summary = _read_json(workdir / "summary.json")
    _check_summary(summary, workdir / "summary.json")
    config = _read_json(workdir / "config.json")
    records, unreadable = _read_records(workdir / "metrics.jsonl")
    if not summary and not records:
        raise ReportError(
            f"{workdir} has neither summary.json nor metrics.jsonl; give the --workdir "
            "of a run that has started"
        )
    predictions = _read_predictions(
        workdir / "predictions.npz", summary.get("task", "")
    )
    notes = [str(note) for note in summary.get("notes", [])]
    if not summary:
        notes.append(
            "No stage has finished: summary.json is missing, so there is no table yet."
        )
    elif summary.get("status") != "finished":
        notes.append(
            f"The run has not finished; stages done: {len(summary.get('stages', []))}. "
            "The same command goes on where it stopped."
        )
    if not predictions:
        notes.append(
            "There is no predictions.npz, so no pictures are shown; --mode=eval writes "
            "it."
        )
    if unreadable:
        notes.append(
            f"{unreadable} unreadable line(s) of metrics.jsonl were left out, as a run "
            "that is killed while it writes leaves them."
        )
    return Run(
        name=workdir.resolve().name,
        summary=summary,
        config=config,
        train=_latest(records, "train", ("stage", "step")),
        evaluations=_latest(records, "eval", ("stage", "step", "network")),
        predictions=predictions,
        notes=tuple(notes),
    )


def number(value: Any) -> float:
    """A JSON value as a float; null and what is no number are NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


def _read_json(path: Path) -> Record:
    """The object in a JSON file; empty if there is no file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _check_summary(summary: Record, path: Path) -> None:
    """Checks that the parts of a summary are lists and objects, as they should be."""
    for key, expected in _SUMMARY_PARTS.items():
        if key in summary and not isinstance(summary[key], expected):
            kind = "an object" if expected is dict else "a list"
            raise ReportError(f"{path}: {key!r} must be {kind}, got {summary[key]!r}")
    for key in ("results", "costs"):
        for name, value in summary.get(key, {}).items():
            if not isinstance(value, dict):
                raise ReportError(
                    f"{path}: {key!r} of {name!r} must be an object, got {value!r}"
                )
    seeds = summary.get("seeds", [])
    for name, values in summary.get("by_seed", {}).items():
        if not isinstance(values, list) or len(values) != len(seeds):
            raise ReportError(
                f"{path}: 'by_seed' of {name!r} must have one object for each of "
                f"{len(seeds)} seeds"
            )
    for stage in summary.get("stages", []):
        if not isinstance(stage, dict) or "name" not in stage:
            raise ReportError(f"{path}: every stage must be an object with a 'name'")


def _read_records(path: Path) -> tuple[list[Record], int]:
    """The records of a JSON-lines file and how many lines were no records."""
    if not path.exists():
        return [], 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error}") from error
    records, unreadable = [], 0
    for line in filter(str.strip, lines):
        try:
            record = json.loads(line)
        except ValueError:
            unreadable += 1
            continue
        if _is_record(record):
            records.append(record)
        else:
            unreadable += 1
    return records, unreadable


def _is_record(value: Any) -> bool:
    """Whether a JSON value is a record of a stage's step."""
    return (
        isinstance(value, dict)
        and {"kind", "stage", "step"} <= value.keys()
        and math.isfinite(number(value["step"]))
        and isinstance(value.get("terms", {}), dict)
    )


def _latest(
    records: list[Record], kind: str, keys: tuple[str, ...]
) -> tuple[Record, ...]:
    """Records of a kind; a resumed run's repetition of a step replaces the first."""
    found = {
        tuple(record.get(key) for key in keys): record
        for record in records
        if record["kind"] == kind
    }
    return tuple(found.values())


def _read_predictions(path: Path, task: str) -> Mapping[str, np.ndarray]:
    """The arrays of `predictions.npz`, checked; empty if there is no file."""
    if not path.exists():
        return {}
    try:
        # Opened here: np.load would leave a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ReportError(
            f"cannot read {path}: {error}; --mode=eval writes it again"
        ) from error
    missing = {"index", "image", "truth"} - arrays.keys()
    if missing:
        raise ReportError(f"{path} lacks {', '.join(sorted(missing))}")
    truth, image = arrays["truth"], arrays["image"]
    rank = {"segmentation": 3, "classification": 1}.get(task, truth.ndim)
    if truth.ndim != rank or rank not in (1, 3):
        raise ReportError(
            f"{path}: 'truth' has shape {truth.shape}, which is not that of a "
            f"{task or 'known task'}"
        )
    plausible = image.dtype == np.uint8 and (image.ndim == 3 or image.shape[3:] == (3,))
    if not plausible or len(image) != len(truth):
        raise ReportError(
            f"{path}: 'image' must be uint8 [n, h, w] or [n, h, w, 3] with n = "
            f"{len(truth)}, got {image.dtype} {image.shape}"
        )
    for key, array in arrays.items():
        kind = key.partition("/")[0]
        if kind in ("index", "truth", "prediction", "confusion"):
            if not np.issubdtype(array.dtype, np.integer):
                raise ReportError(
                    f"{path}: {key!r} must be integers, got {array.dtype}"
                )
        if kind == "truth":
            good = rank == 1 or truth.shape == image.shape[:3]
        elif kind == "prediction":
            good = array.shape == truth.shape
        elif kind == "index":
            good = array.shape == truth.shape[:1]
        elif kind == "probabilities":
            good = array.ndim == 2 and len(array) == len(truth)
        elif kind == "confusion":
            good = array.ndim == 2 and array.shape[0] == array.shape[1]
        else:
            good = True
        if not good:
            raise ReportError(
                f"{path}: {key!r} has shape {array.shape}, which does not belong to "
                f"'truth' {truth.shape} and 'image' {image.shape}"
            )
    return arrays
