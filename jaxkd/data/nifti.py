"""Data sets of NIfTI volumes: KiTS19, LiTS, Medical Decathlon, and plain folders.

Each factory finds the cases of one layout and splits them by case, so that no patient
is on both sides; `VolumeOptions` in `jaxkd.data.volumes` explains the shared options.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from jaxkd.data.cases import KITS19_COUNT, kits19_split, lits_case, lits_split
from jaxkd.data.registry import register
from jaxkd.data.source import (
    DamagedFileError,
    OnError,
    Split,
    check_split,
    require_path,
)
from jaxkd.data.split import fold_by_group, split_by_group
from jaxkd.data.volumes import (
    Case,
    Normalization,
    Slices,
    Target,
    VolumeOptions,
    VolumeSource,
    Window,
    window,
)

__all__ = ["decathlon", "kits19", "lits", "nifti", "window"]

_FOLDS = 5
_TEST_FRACTION = 0.2

_log = logging.getLogger(__name__)


@register()
def kits19(
    *,
    split: Split,
    path: str | Path,
    target: Target = "tumor",
    slices: Slices = "target",
    window: Window | None = (-200.0, 300.0),
    normalization: Normalization = "window",
    image_size: int | None = 512,
    test_fraction: float | None = None,
    fold: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    volumes_in_memory: int = 4,
    on_error: OnError = "raise",
) -> VolumeSource:
    """KiTS19: `PATH/case_00000/imaging.nii.gz` and `segmentation.nii.gz`.

    Cases are split by the fixed lists of `jaxkd.data.cases`, also when some of the 210
    cases are missing, unless `test_fraction` or `fold` is given. With other cases, or
    none of one side, a random fifth is the test split, and a warning says so.
    Cases 210 and following of the challenge have no segmentation and are not used.

    Args:
      split: "train" or "test".
      path: the folder with the cases.
      target: see `VolumeOptions`; labels are 1 kidney, 2 tumor.
      slices: see `VolumeOptions`.
      window: in Hounsfield units.
      normalization: see `VolumeOptions`.
      image_size: height and width.
      test_fraction: share of the cases in the test split.
      fold: 0 to 4: that fifth of the cases is the test split.
      seed: of the split by fraction or fold.
      cache: folder for decompressed volumes.
      volumes_in_memory: how many volumes each process keeps.
      on_error: "raise" or "skip", see `jaxkd.data.load`.

    Raises:
      FileNotFoundError: no cases, or a file of a case is missing.
      DamagedFileError: see `VolumeSource`.

    Reference:
      N. Heller et al., "The KiTS19 Challenge Data", arXiv:1904.00445, 2019.
    """
    path = require_path(path, "kits19")
    cases = []
    for folder in sorted(path.glob("case_*")):
        label = folder / "segmentation.nii.gz"
        number = re.fullmatch(r"case_(\d+)", folder.name)
        if number is None or (int(number[1]) >= KITS19_COUNT and not label.exists()):
            continue
        cases.append(
            Case(name=folder.name, image=folder / "imaging.nii.gz", label=label)
        )
    return _open_split(
        "kits19",
        cases,
        path,
        split,
        class_names=("background", "kidney", "tumor"),
        published=kits19_split(),
        options=VolumeOptions(
            target=target,
            slices=slices,
            window=window,
            normalization=normalization,
            image_size=image_size,
            slice_axis=0,
            cache=cache,
            volumes_in_memory=volumes_in_memory,
        ),
        test_fraction=test_fraction,
        fold=fold,
        seed=seed,
        on_error=on_error,
    )


@register()
def lits(
    *,
    split: Split,
    path: str | Path,
    target: Target = "tumor",
    slices: Slices = "target",
    window: Window | None = (-40.0, 160.0),
    normalization: Normalization = "window",
    image_size: int | None = 512,
    test_fraction: float | None = None,
    fold: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    volumes_in_memory: int = 4,
    on_error: OnError = "raise",
) -> VolumeSource:
    """LiTS: `volume-0.nii` and `segmentation-0.nii` (or `.nii.gz`), in any folders.

    The files are looked for in `path` and all folders below it. Cases are split by the
    fixed lists of `jaxkd.data.cases`, also when some of the 131 cases are missing,
    unless `test_fraction` or `fold` is given. With other cases, or none of one side, a
    random fifth is the test split, and a warning says so.

    Args:
      split: "train" or "test".
      path: the folder.
      target: see `VolumeOptions`; labels are 1 liver, 2 tumor.
      slices: see `VolumeOptions`.
      window: in Hounsfield units.
      normalization: see `VolumeOptions`.
      image_size: height and width.
      test_fraction: share of the cases in the test split.
      fold: 0 to 4: that fifth of the cases is the test split.
      seed: of the split by fraction or fold.
      cache: folder for decompressed volumes.
      volumes_in_memory: how many volumes each process keeps.
      on_error: "raise" or "skip", see `jaxkd.data.load`.

    Raises:
      FileNotFoundError: no cases, or a file of a case is missing.
      DamagedFileError: see `VolumeSource`.

    Reference:
      P. Bilic et al., "The Liver Tumor Segmentation Benchmark (LiTS)", Medical Image
      Analysis, 2023.
    """
    path = require_path(path, "lits")
    images, labels = _numbered(path, "volume"), _numbered(path, "segmentation")
    cases = [
        Case(
            name=lits_case(number),
            image=images.get(number, path / f"volume-{number}.nii"),
            label=labels.get(number, path / f"segmentation-{number}.nii"),
        )
        for number in sorted(images | labels)
    ]
    return _open_split(
        "lits",
        cases,
        path,
        split,
        class_names=("background", "liver", "tumor"),
        published=lits_split(),
        options=VolumeOptions(
            target=target,
            slices=slices,
            window=window,
            normalization=normalization,
            image_size=image_size,
            slice_axis=2,
            cache=cache,
            volumes_in_memory=volumes_in_memory,
        ),
        test_fraction=test_fraction,
        fold=fold,
        seed=seed,
        on_error=on_error,
    )


@register()
def decathlon(
    *,
    split: Split,
    path: str | Path,
    target: Target = "labels",
    slices: Slices = "target",
    window: Window | None = None,
    normalization: Normalization = "volume",
    image_size: int | None = None,
    test_fraction: float | None = None,
    fold: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    volumes_in_memory: int = 4,
    on_error: OnError = "raise",
) -> VolumeSource:
    """A task of the Medical Segmentation Decathlon: `PATH/dataset.json` and volumes.

    The pairs listed under "training" are split by case; the others have no labels.
    Volumes with a fourth axis (several MR sequences) give images with as many channels.

    Args:
      split: "train" or "test".
      path: the folder, for example `Task04_Hippocampus`.
      target: see `VolumeOptions`.
      slices: see `VolumeOptions`.
      window: intensities kept, or None for all.
      normalization: see `VolumeOptions`.
      image_size: height and width; None needs volumes of one size.
      test_fraction: share of the cases in the test split.
      fold: 0 to 4: that fifth of the cases is the test split.
      seed: of the split.
      cache: folder for decompressed volumes.
      volumes_in_memory: how many volumes each process keeps.
      on_error: "raise" or "skip", see `jaxkd.data.load`.

    Raises:
      FileNotFoundError: there is no `dataset.json`.
      DamagedFileError: `dataset.json` is of another form; see also `VolumeSource`.

    Reference:
      M. Antonelli et al., "The Medical Segmentation Decathlon", Nature Communications,
      2022.
    """
    path = require_path(path, "decathlon")
    class_names, pairs = _read_dataset_json(path / "dataset.json")
    cases = [
        Case(name=_case_name(image), image=path / image, label=path / label)
        for image, label in pairs
    ]
    return _open_split(
        path.name,
        cases,
        path,
        split,
        class_names=class_names,
        published=None,
        options=VolumeOptions(
            target=target,
            slices=slices,
            window=window,
            normalization=normalization,
            image_size=image_size,
            slice_axis=2,
            cache=cache,
            volumes_in_memory=volumes_in_memory,
        ),
        test_fraction=test_fraction,
        fold=fold,
        seed=seed,
        on_error=on_error,
    )


@register()
def nifti(
    *,
    split: Split,
    path: str | Path,
    class_names: Sequence[str],
    images: str = "images",
    labels: str = "labels",
    slice_axis: int = 2,
    target: Target = "labels",
    slices: Slices = "target",
    window: Window | None = None,
    normalization: Normalization = "volume",
    image_size: int | None = None,
    test_fraction: float | None = None,
    fold: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    volumes_in_memory: int = 4,
    on_error: OnError = "raise",
) -> VolumeSource:
    """Plain folders: `PATH/images/NAME.nii.gz` and `PATH/labels/NAME.nii.gz`.

    Files may end in `.nii` or `.nii.gz`; an image and its segmentation have one name,
    which is the case.

    Args:
      split: "train" or "test".
      path: the folder that holds both.
      class_names: name of label 0, 1, ... in the files, the background first.
      images: name of the folder with images.
      labels: name of the folder with segmentations.
      slice_axis: which axis of the files counts slices, 0 or 2.
      target: see `VolumeOptions`.
      slices: see `VolumeOptions`.
      window: intensities kept, or None for all.
      normalization: see `VolumeOptions`.
      image_size: height and width; None needs volumes of one size.
      test_fraction: share of the cases in the test split.
      fold: 0 to 4: that fifth of the cases is the test split.
      seed: of the split.
      cache: folder for decompressed volumes.
      volumes_in_memory: how many volumes each process keeps.
      on_error: "raise" or "skip", see `jaxkd.data.load`.

    Raises:
      FileNotFoundError: a folder is missing.
      DamagedFileError: see `VolumeSource`.
    """
    path = require_path(path, "nifti")
    image_files, label_files = _volumes(path / images), _volumes(path / labels)
    cases = [
        Case(
            name=name,
            image=image_files.get(name, path / images / f"{name}.nii.gz"),
            label=label_files.get(name, path / labels / f"{name}.nii.gz"),
        )
        for name in sorted(image_files | label_files)
    ]
    return _open_split(
        path.name,
        cases,
        path,
        split,
        class_names=class_names,
        published=None,
        options=VolumeOptions(
            target=target,
            slices=slices,
            window=window,
            normalization=normalization,
            image_size=image_size,
            slice_axis=slice_axis,
            cache=cache,
            volumes_in_memory=volumes_in_memory,
        ),
        test_fraction=test_fraction,
        fold=fold,
        seed=seed,
        on_error=on_error,
    )


def _open_split(
    name: str,
    cases: Sequence[Case],
    path: Path,
    split: Split,
    *,
    class_names: Sequence[str],
    published: tuple[list[str], list[str]] | None,
    options: VolumeOptions,
    test_fraction: float | None,
    fold: int | None,
    seed: int,
    on_error: OnError,
) -> VolumeSource:
    """Chooses the cases of one side and opens them."""
    check_split(split)
    if not cases:
        raise FileNotFoundError(f"{name}: no cases in {path}")
    if fold is not None and test_fraction is not None:
        raise ValueError("give fold or test_fraction, not both")
    names = [case.name for case in cases]
    if fold is not None:
        sides = fold_by_group(names, _FOLDS, fold, seed)
        chosen = {names[i] for i in sides[split == "test"]}
    elif test_fraction is None and published and _covers(published, names):
        chosen = set(published[split == "test"])
    else:
        fraction = _TEST_FRACTION if test_fraction is None else test_fraction
        if test_fraction is None and published:
            _log.warning(
                "%s: the %d case(s) in %s are not those of the published split, or all "
                "on one side of it; used a random split instead (test_fraction=%s, "
                "seed=%d)",
                name,
                len(names),
                path,
                fraction,
                seed,
            )
        sides = split_by_group(names, fraction, seed)
        chosen = {names[i] for i in sides[split == "test"]}
    return VolumeSource(
        name,
        [case for case in cases if case.name in chosen],
        class_names=class_names,
        options=options,
        on_error=on_error,
    )


def _covers(published: tuple[list[str], list[str]], names: Sequence[str]) -> bool:
    """Whether published lists know all cases, and each has one of them."""
    train, test = (set(side) for side in published)
    there = set(names)
    return there <= train | test and bool(there & train) and bool(there & test)


def _case_name(path: str | Path) -> str:
    """The name of a file without `.nii` or `.nii.gz`."""
    return re.sub(r"\.nii(\.gz)?$", "", Path(path).name)


def _volumes(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"nifti: there is no folder {folder}")
    return {
        _case_name(file): file
        for pattern in ("*.nii", "*.nii.gz")
        for file in folder.glob(pattern)
        if not file.name.startswith(".")
    }


def _numbered(folder: Path, prefix: str) -> dict[int, Path]:
    """Files `PREFIX-NUMBER.nii` or `.nii.gz` in a folder and all below it."""
    found: dict[int, Path] = {}
    for file in sorted(folder.rglob(f"{prefix}-*.nii*")):
        match = re.fullmatch(rf"{prefix}-(\d+)\.nii(\.gz)?", file.name)
        if match is None:
            continue
        number = int(match[1])
        if number in found:
            raise ValueError(
                f"{prefix}-{number} is there twice: {found[number]} and {file}; "
                "keep one"
            )
        found[number] = file
    return found


def _read_dataset_json(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Class names and pairs of image and label files."""
    if not path.exists():
        raise FileNotFoundError(f"decathlon: there is no file {path}")
    try:
        content = json.loads(path.read_text())
        names = {int(number): str(name) for number, name in content["labels"].items()}
        class_names = [names[i] for i in range(len(names))]
        pairs = [(str(x["image"]), str(x["label"])) for x in content["training"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(
            path,
            'expected "labels" as {"0": "background", ...} and "training" as a list '
            f"of image and label ({type(error).__name__}: {error})",
        ) from error
    return class_names, pairs
