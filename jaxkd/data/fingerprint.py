"""Short names for long arrays: what a data set, or a network's variables, holds.

Stored teacher targets belong to one data set and one teacher. Their fingerprints tell
when another one came in their place.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxkd.data.pipeline import read_records
from jaxkd.data.source import Source

# Sets above this size are told apart by a sample of their records.
_WHOLE_BYTES = 2**28
_SAMPLE = 1024
_CHUNK = 256


def source_fingerprint(
    source: Source, *, whole_bytes: int = _WHOLE_BYTES
) -> dict[str, Any]:
    """What tells a source from others, as plain JSON.

    Images and labels of all records are hashed if the images take at most
    `whole_bytes`, otherwise those of 1,024 records at even distances.

    Args:
      source: the records.
      whole_bytes: see above.

    Returns:
      Its name, number of records, classes and image shape, how many records were
      hashed, and their SHA-256.
    """
    info, count = source.info, len(source)
    image = np.asarray(source[0]["image"])
    indices = np.arange(count)
    if count * image.nbytes > whole_bytes and count > _SAMPLE:
        indices = np.linspace(0, count - 1, _SAMPLE).astype(np.int64)
    digest = hashlib.sha256()
    for first in range(0, len(indices), _CHUNK):
        batch = read_records(source, indices[first : first + _CHUNK])
        for image, label in zip(batch["image"], batch["label"], strict=True):
            _add(digest, "image", image)
            _add(digest, "label", np.asarray(label))
    return {
        "source": info.name,
        "records": count,
        "classes": list(info.class_names),
        "image_shape": list(info.image_shape),
        "hashed_records": len(indices),
        "sha256": digest.hexdigest(),
    }


def tree_fingerprint(tree: Any) -> str:
    """SHA-256 over the paths, dtypes, shapes and bytes of a tree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        _add(digest, name, _whole(leaf))
    return digest.hexdigest()


def _whole(leaf: Any) -> np.ndarray:
    """An array on the host, also if other processes hold parts of it."""
    if isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _add(digest: Any, name: str, array: np.ndarray) -> None:
    # Name, type and shape first: the same bytes in another shape are another array.
    digest.update(f"{name} {array.dtype.name} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
