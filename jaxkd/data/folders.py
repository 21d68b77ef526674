"""Folders of image files: one folder per class, or images beside masks.

Files are decoded when a record is read; see `jaxkd.data.pixels` for the rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxkd.data.pixels import (
    EXTENSIONS,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
)
from jaxkd.data.registry import register
from jaxkd.data.source import (
    DamagedFileError,
    OnError,
    Record,
    SourceInfo,
    Split,
    check_split,
    keep_readable,
    require_path,
)
from jaxkd.data.split import check_disjoint, split_by_group

_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation"),
}


class ImageFolderSource:
    """Image files with a class each; see `image_folder`."""

    def __init__(
        self,
        name: str,
        files: Sequence[tuple[Path, int]],
        *,
        class_names: Sequence[str],
        groups: Sequence[str],
        channels: int,
        image_size: int | None,
        on_error: OnError,
    ):
        self._channels, self._image_size = channels, image_size
        kept, skipped = keep_readable(
            list(zip(files, groups, strict=True)),
            self._check_item(),
            name=name,
            on_error=on_error,
        )
        if not kept:
            raise ValueError(f"{name}: there is no readable image")
        self._files = tuple(file for file, _ in kept)
        self.groups: Sequence[str] = tuple(group for _, group in kept)
        shape = _first_shape(self._files[0][0], channels, image_size)
        self.info = SourceInfo(
            name=name,
            task="classification",
            class_names=tuple(class_names),
            image_shape=shape,
            skipped=skipped,
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        path, label = self._files[index]
        image = read_image(path, self._channels)
        image = _fit(image, path, self.info.image_shape, self._image_size)
        return {"image": image, "label": np.asarray(label, np.int32)}

    def _check_item(self) -> Callable[[tuple[tuple[Path, int], str]], None]:
        check_size = _size_check(self._image_size)

        def check(item: tuple[tuple[Path, int], str]) -> None:
            (path, _), _ = item
            check_size(read_image(path, self._channels), path)

        return check


class MaskFolderSource:
    """Image files with a mask file each; see `image_mask_folder`."""

    def __init__(
        self,
        name: str,
        pairs: Sequence[tuple[Path, Path]],
        *,
        class_names: Sequence[str],
        groups: Sequence[str],
        channels: int,
        threshold: int | None,
        mask_values: Sequence[int] | None,
        image_size: int | None,
        on_error: OnError,
    ):
        self._channels, self._image_size = channels, image_size
        self._threshold = threshold
        if mask_values is None:
            mask_values = range(len(class_names))
        self._mask_values = np.asarray(mask_values)
        kept, skipped = keep_readable(
            list(zip(pairs, groups, strict=True)),
            self._check_item(),
            name=name,
            on_error=on_error,
        )
        if not kept:
            raise ValueError(f"{name}: there is no readable image with its mask")
        self._pairs = tuple(pair for pair, _ in kept)
        self.groups: Sequence[str] = tuple(group for _, group in kept)
        shape = _first_shape(self._pairs[0][0], channels, image_size)
        self.info = SourceInfo(
            name=name,
            task="segmentation",
            class_names=tuple(class_names),
            image_shape=shape,
            skipped=skipped,
        )

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Record:
        image_path, mask_path = self._pairs[index]
        image, mask = self._read(image_path, mask_path)
        image = _fit(image, image_path, self.info.image_shape, self._image_size)
        if self._image_size is not None:
            mask = resize_mask(mask, self._image_size)
        return {"image": image, "label": mask}

    def _check_item(self) -> Callable[[tuple[tuple[Path, Path], str]], None]:
        check_size = _size_check(self._image_size)

        def check(item: tuple[tuple[Path, Path], str]) -> None:
            (image_path, mask_path), _ = item
            check_size(self._read(image_path, mask_path)[0], image_path)

        return check

    def _read(self, image_path: Path, mask_path: Path) -> tuple[np.ndarray, np.ndarray]:
        image = read_image(image_path, self._channels)
        # A threshold is meant for grey values, where bits are black and white.
        mask = read_mask(mask_path, white=1 if self._threshold is None else 255)
        if mask.shape != image.shape[:2]:
            raise DamagedFileError(
                mask_path,
                f"the mask is {_size(mask)} but its image {image_path.name} is "
                f"{_size(image)}",
            )
        if self._threshold is not None:
            return image, (mask > self._threshold).astype(np.int32)
        found, inverse = np.unique(mask, return_inverse=True)
        is_value = found[:, None] == self._mask_values[None, :]
        if not is_value.any(axis=1).all():
            wrong = found[~is_value.any(axis=1)].max()
            raise DamagedFileError(
                mask_path,
                f"the mask holds the value {wrong}, the classes are "
                f"{self._mask_values.tolist()}; name all classes in class_names, or "
                "set mask_values, or threshold (127 for masks of 0 and 255)",
            )
        classes = is_value.argmax(axis=1).astype(np.int32)
        return image, classes[inverse].reshape(mask.shape)


@register()
def image_folder(
    *,
    split: Split,
    path: str | Path,
    channels: int = 3,
    image_size: int | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    group_pattern: str | None = None,
    on_error: OnError = "raise",
) -> ImageFolderSource:
    """A folder per class: `PATH/train/CLASS/*` and `PATH/test/CLASS/*`.

    Without folders for the splits (`train`, `training`; `test`, `testing`, `val`,
    `valid`, `validation`), `PATH/CLASS/*` is split by group. Classes are the folder
    names in alphabetical order. Files that are not images by their extension are not
    read.

    Args:
      split: "train" or "test".
      path: the folder.
      channels: 1 or 3.
      image_size: resize to this height and width; needed if the images differ.
      test_fraction: share of the groups in the test split, without split folders.
      seed: of that split.
      group_pattern: regular expression, searched in the file's name, whose first
        group names the record's group (`"(patient[0-9]+)_"`); default each file alone.
      on_error: "raise" or "skip", see `jaxkd.data.load`.

    Raises:
      FileNotFoundError: a folder is missing or holds no images.
      DamagedFileError: a file cannot be decoded (also later, when it is read).
      ValueError: a group is in both splits, or an argument is impossible.
    """
    check_split(split)
    _check_channels(channels)
    path = require_path(path, "image_folder")
    folders = _split_folders(path)
    root = folders["train"] if folders else path
    class_names = [d.name for d in sorted(root.iterdir()) if _is_visible_folder(d)]
    if len(class_names) < 2:
        raise FileNotFoundError(
            f"image_folder: {root} needs one folder per class, found {class_names}"
        )
    listed = {
        side: _list_classes(folder, class_names)
        for side, folder in (folders or {"all": path}).items()
    }
    files, groups = _one_side(
        listed, path, split, test_fraction, seed, group_pattern, "image_folder"
    )
    return ImageFolderSource(
        path.name,
        files,
        class_names=class_names,
        groups=groups,
        channels=channels,
        image_size=image_size,
        on_error=on_error,
    )


@register()
def image_mask_folder(
    *,
    split: Split,
    path: str | Path,
    class_names: Sequence[str] = ("background", "foreground"),
    threshold: int | None = None,
    mask_values: Sequence[int] | None = None,
    channels: int = 1,
    image_size: int | None = None,
    images: str = "images",
    masks: str = "masks",
    mask_suffix: str = "",
    test_fraction: float = 0.2,
    seed: int = 0,
    group_pattern: str | None = None,
    on_error: OnError = "raise",
) -> MaskFolderSource:
    """Images beside masks: `PATH/train/images/*` and `PATH/train/masks/*`.

    Without folders for the splits, `PATH/images/*` is split by group. An image and its
    mask have one name, whatever their extensions; in folders below `images`, the same
    folder below `masks` (`images/a/1.jpg` and `masks/a/1.png`).

    Args:
      split: "train" or "test".
      path: the folder.
      class_names: name per class, the background first.
      threshold: mask values above it are class 1, others class 0; a mask of one bit
        per pixel has the values 0 and 255 here, and 0 and 1 without a threshold.
      mask_values: which value in the masks is class 0, 1, ... (`(0, 126, 255)`);
        default the number of the class.
      channels: 1 or 3, of the images.
      image_size: resize to this height and width, masks by the nearest pixel; needed
        if the images differ.
      images: name of the folder with images.
      masks: name of the folder with masks.
      mask_suffix: what the name of a mask has more than that of its image (`"_GT"`).
      test_fraction: share of the groups in the test split, without split folders.
      seed: of that split.
      group_pattern: regular expression for the group, as for `image_folder`.
      on_error: "raise" or "skip", see `jaxkd.data.load`.

    Raises:
      FileNotFoundError: a folder is missing, or an image or a mask has no partner.
      DamagedFileError: a file cannot be decoded, a mask has another size than its
        image, or holds a value that is no class (also later, when it is read).
      ValueError: a group is in both splits, two images or two masks differ only in
        their extension, or an argument is impossible.
    """
    check_split(split)
    _check_channels(channels)
    if threshold is not None and len(class_names) != 2:
        raise ValueError(
            f"threshold makes 2 classes but class_names has {len(class_names)}"
        )
    if mask_values is not None and (
        threshold is not None or len(mask_values) != len(class_names)
    ):
        raise ValueError(
            "mask_values needs one value per class name and excludes threshold, got "
            f"{len(mask_values)} values for {len(class_names)} classes"
        )
    path = require_path(path, "image_mask_folder")
    folders = _split_folders(path)
    listed = {
        side: _list_pairs(folder / images, folder / masks, mask_suffix)
        for side, folder in (folders or {"all": path}).items()
    }
    pairs, groups = _one_side(
        listed, path, split, test_fraction, seed, group_pattern, "image_mask_folder"
    )
    return MaskFolderSource(
        path.name,
        pairs,
        class_names=class_names,
        groups=groups,
        channels=channels,
        threshold=threshold,
        mask_values=mask_values,
        image_size=image_size,
        on_error=on_error,
    )


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")


def _is_visible_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _split_folders(path: Path) -> dict[str, Path]:
    """The folder of each split, or nothing if there are none."""
    found = {
        split: next((path / name for name in names if (path / name).is_dir()), None)
        for split, names in _SPLIT_FOLDERS.items()
    }
    folders = {split: folder for split, folder in found.items() if folder is not None}
    if len(folders) == 1:
        (only,) = folders
        missing = "test" if only == "train" else "train"
        raise FileNotFoundError(
            f"{path} has the folder {folders[only].name} but none for the {missing} "
            f"split ({', '.join(_SPLIT_FOLDERS[missing])})"
        )
    return folders


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in EXTENSIONS
        # Hidden folders hold copies, such as .ipynb_checkpoints.
        and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    )


def _files_by_name(folder: Path) -> dict[str, Path]:
    """Image files by their path in the folder without the extension."""
    found: dict[str, Path] = {}
    for file in _image_files(folder):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ValueError(
                f"{found[name]} and {file} have one name, so that their partner is "
                "not clear; keep one"
            )
        found[name] = file
    return found


def _list_classes(folder: Path, class_names: list[str]) -> list[tuple[Path, int]]:
    others = [
        d.name
        for d in sorted(folder.iterdir())
        if _is_visible_folder(d) and d.name not in class_names
    ]
    if others:
        raise FileNotFoundError(
            f"{folder} has the class {others[0]!r}, which the training split lacks"
        )
    files = [
        (file, label)
        for label, name in enumerate(class_names)
        for file in _image_files(folder / name)
    ]
    if not files:
        raise FileNotFoundError(f"no images in the class folders of {folder}")
    return files


def _list_pairs(images: Path, masks: Path, suffix: str) -> list[tuple[Path, Path]]:
    for folder in (images, masks):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
    by_name = _files_by_name(masks)
    pairs = []
    for name, file in _files_by_name(images).items():
        mask = by_name.pop(name + suffix, None)
        if mask is None:
            raise FileNotFoundError(f"{file} has no mask {name + suffix}.* in {masks}")
        pairs.append((file, mask))
    if by_name:
        raise FileNotFoundError(
            f"{len(by_name)} mask(s) in {masks} have no image, the first is "
            f"{min(by_name.values())}"
        )
    if not pairs:
        raise FileNotFoundError(f"no images in {images}")
    return pairs


def _one_side(
    listed: dict[str, list],
    root: Path,
    split: str,
    test_fraction: float,
    seed: int,
    group_pattern: str | None,
    name: str,
) -> tuple[list, list[str]]:
    """Files and groups of one split, from listings by split or from one listing."""
    groups = {
        side: [_group(item[0], root, group_pattern) for item in items]
        for side, items in listed.items()
    }
    if "all" not in listed:
        if group_pattern is not None:
            check_disjoint(groups["train"], groups["test"], name)
        return listed[split], groups[split]
    train, test = split_by_group(groups["all"], test_fraction, seed)
    chosen = train if split == "train" else test
    return [listed["all"][i] for i in chosen], [groups["all"][i] for i in chosen]


def _group(file: Path, root: Path, pattern: str | None) -> str:
    if pattern is None:
        return file.relative_to(root).as_posix()
    match = re.search(pattern, file.name)
    if match is None or not match.groups():
        raise ValueError(
            f"group_pattern {pattern!r} finds no group in the file name {file.name}; "
            "it needs parentheses around the part that names the group"
        )
    return match.group(1)


def _first_shape(
    path: Path, channels: int, image_size: int | None
) -> tuple[int, int, int]:
    if image_size is not None:
        return image_size, image_size, channels
    height, width, _ = read_image(path, channels).shape
    return height, width, channels


def _fit(
    image: np.ndarray, path: Path, shape: tuple[int, ...], image_size: int | None
) -> np.ndarray:
    if image_size is not None:
        return resize_image(image, image_size)
    _check_shape(image, path, shape)
    return image


def _size_check(image_size: int | None) -> Callable[[np.ndarray, Path], None]:
    """A check that images have the size of the first one it is called with."""
    shapes: list[tuple[int, ...]] = []

    def check(image: np.ndarray, path: Path) -> None:
        if image_size is None:
            shapes.append(image.shape)
            _check_shape(image, path, shapes[0])

    return check


def _check_shape(image: np.ndarray, path: Path, shape: tuple[int, ...]) -> None:
    if image.shape != shape:
        raise DamagedFileError(
            path,
            f"the image is {_size(image)} but the first one is "
            f"{shape[0]}x{shape[1]}; set image_size to bring them to one size",
        )


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[0]}x{pixels.shape[1]}"
