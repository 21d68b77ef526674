"""Soft labels kept as a few classes each, and dense again (FKD's label formats).

A compressed label is a pair of arrays: the classes kept, int32 `[..., k]`, and their
probabilities `[..., k]`, largest first. Its format says how many classes are kept and
what the others get when the label is recovered:

| format | k | the other classes |
|---|---|---|
| `ori` | all, in class order | |
| `hard` | 1 | 0, and the kept class gets 1 |
| `smoothing` | 1 | an equal share of the rest |
| `marginal_smoothing_k5`, `..._k10`, ... | the number | an equal share of the rest |
| `marginal_renorm`, `marginal_renorm_k10`, ... | 5, or the number | 0, kept sum to 1 |
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Integer


def kept_classes(label_format: str, num_classes: int) -> int:
    """How many classes a format keeps of each label.

    Raises:
      ValueError: no such format, or too few classes for it.

    >>> kept_classes("marginal_smoothing_k5", 1000)
    5
    """
    if label_format == "ori":
        return num_classes
    if label_format == "hard":
        return 1
    if label_format == "smoothing":
        kept, needed = 1, 2
    elif found := re.fullmatch(r"marginal_smoothing_k([1-9]\d*)", label_format):
        kept = int(found[1])
        needed = kept + 1
    elif found := re.fullmatch(r"marginal_renorm(?:_k([1-9]\d*))?", label_format):
        kept = needed = int(found[1] or 5)
    else:
        raise ValueError(
            f"label_format must be 'ori', 'hard', 'smoothing', 'marginal_smoothing_k5' "
            f"or 'marginal_renorm' (with _k and any number), got {label_format!r}"
        )
    if num_classes < needed:
        raise ValueError(
            f"label_format {label_format!r} needs at least {needed} classes, "
            f"got {num_classes}"
        )
    return kept


def compress_labels(
    probabilities: Float[Array, "*lead classes"], *, label_format: str
) -> tuple[Int32[Array, "*lead k"], Float32[Array, "*lead k"]]:
    """Keeps the largest entries of soft labels.

    Args:
      probabilities: `[..., classes]`, each label summing to 1.
      label_format: see the module docstring.

    Returns:
      The classes kept, int32 `[..., k]`, and their probabilities, float32 `[..., k]`:
      the values as they come, also where `recover_labels` will rescale them. Of equal
      entries, the lower class comes first.

    Raises:
      ValueError: no such format, or too few classes for it.

    Example:
      >>> index, probability = compress_labels(
      ...     jnp.array([[0.1, 0.7, 0.2]]), label_format="marginal_smoothing_k2"
      ... )
      >>> index.tolist()
      [[1, 2]]

    Reference:
      Shen, Xing, "A Fast Knowledge Distillation Framework for Visual Recognition",
      ECCV 2022, section 3.3.
    """
    kept = kept_classes(label_format, probabilities.shape[-1])
    values = probabilities.astype(jnp.float32)
    if label_format == "ori":
        index = jnp.arange(kept, dtype=jnp.int32)
        index = index.reshape((1,) * (values.ndim - 1) + (-1,))
        return jnp.broadcast_to(index, values.shape), values
    values, index = jax.lax.top_k(values, kept)
    return index.astype(jnp.int32), values


def recover_labels(
    index: Integer[Array, "*lead k"],
    probability: Float[Array, "*lead k"],
    *,
    label_format: str,
    num_classes: int,
) -> Float32[Array, "*lead classes"]:
    """Makes dense soft labels of compressed ones.

    What the kept classes leave of 1 is clipped at 0, because probabilities stored in
    half precision can sum to a little more than 1.

    Args:
      index: the classes kept.
      probability: their probabilities, float32 or narrower.
      label_format: the format in which they were compressed.
      num_classes: number of all classes.

    Returns:
      float32 `[..., num_classes]`.

    Raises:
      ValueError: no such format, too few classes for it, or arrays that do not hold
        as many classes as it keeps.
    """
    kept = kept_classes(label_format, num_classes)
    if index.shape != probability.shape or index.shape[-1] != kept:
        raise ValueError(
            f"label_format {label_format!r} keeps {kept} of {num_classes} classes; "
            f"got index {index.shape} and probability {probability.shape}"
        )
    values = probability.astype(jnp.float32)
    total = jnp.sum(values, axis=-1, keepdims=True)
    share = jnp.zeros_like(total)
    if label_format == "hard":
        values = jnp.ones_like(values)
    elif label_format.startswith("marginal_renorm"):
        values = values / jnp.where(total > 0, total, 1.0)
    elif label_format != "ori":
        share = jnp.maximum(1.0 - total, 0.0) / (num_classes - kept)
    dense = jnp.broadcast_to(share, (*index.shape[:-1], num_classes))
    return jnp.put_along_axis(dense, index, values, axis=-1, inplace=False)
