"""Masks: which numbers of which kernels take part.

A mask is a bool array in the shape of its kernel, `[height, width, in, out]` or
`[in, out]`. The functions here make masks (Bernoulli, random of exact size, by
magnitude) and change them (`exchange`); `Scope` says which kernels of a network get
one. Unstructured masks are simulated: dense hardware computes the zeros as well.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of parameters by their paths."""
Outputs = Literal["any", "one"]

# Beside these the first convolution is found by its shape where no name tells it.
STEM = r"(^|/)(stem|patches|patch_embed)[^/]*(/|$)"
HEAD = r"(^|/)head(_[^/]*)?(/|$)"


def kept_count(size: int, sparsity: float) -> int:
    """How many of `size` numbers are left at a sparsity: `size - int(s * size)`."""
    return size - int(sparsity * size)


def topk_mask(scores: jax.Array, count: int | jax.Array) -> jax.Array:
    """Marks the `count` largest scores; of equal ones the first.

    Args:
      scores: of any shape, without NaN.
      count: a number or an int32 scalar, at most the size.

    Returns:
      A bool array in the shape of the scores with exactly `count` entries set.
    """
    flat = scores.reshape(-1)
    count = jnp.asarray(count, jnp.int32)
    # One sort of the values; the order of equal ones comes from a running sum.
    smallest_kept = jnp.sort(flat)[jnp.clip(flat.size - count, 0, flat.size - 1)]
    above, level = flat > smallest_kept, flat == smallest_kept
    places = count - jnp.sum(above, dtype=jnp.int32)
    chosen = above | (level & (jnp.cumsum(level, dtype=jnp.int32) <= places))
    return (chosen & (count > 0)).reshape(scores.shape)


def topk_masks(
    scores: Mapping[str, jax.Array], count: int | jax.Array
) -> dict[str, jax.Array]:
    """Marks the `count` largest scores of several arrays taken together.

    Args:
      scores: by path.
      count: over all of them.

    Returns:
      A bool array for each, in its shape.
    """
    flat = jnp.concatenate([x.reshape(-1) for x in scores.values()])
    chosen = topk_mask(flat, count)
    masks, start = {}, 0
    for path, x in scores.items():
        masks[path] = chosen[start : start + x.size].reshape(x.shape)
        start += x.size
    return masks


def magnitude_mask(
    weights: jax.Array, sparsity: float, *, outputs: Outputs = "any"
) -> jax.Array:
    """Keeps the `size - int(s * size)` largest weights by absolute value.

    Args:
      weights: of any shape.
      sparsity: in [0, 1].
      outputs: "one" keeps the largest weight of every output channel first.
    """
    scores = jnp.abs(weights)
    if outputs == "one":
        scores = protect_outputs(scores)
    return topk_mask(scores, kept_count(weights.size, sparsity))


def random_mask(
    key: jax.Array,
    shape: Sequence[int],
    count: int | jax.Array,
    *,
    outputs: Outputs = "any",
) -> jax.Array:
    """A mask of exactly `count` entries at random places.

    Args:
      key: a random key.
      shape: of the mask.
      count: of the entries.
      outputs: "one" gives every output channel an entry first.
    """
    scores = jax.random.uniform(key, tuple(shape))
    return topk_mask(protect_outputs(scores) if outputs == "one" else scores, count)


def bernoulli_mask(
    key: jax.Array, shape: Sequence[int], sparsity: float, *, outputs: Outputs = "any"
) -> jax.Array:
    """A mask whose entries are set with probability `1 - s`; their count is random.

    Args:
      key: a random key.
      shape: of the mask.
      sparsity: in [0, 1].
      outputs: "one" sets a further entry in output channels that have none.
    """
    draws = jax.random.uniform(key, tuple(shape))
    mask = draws < 1.0 - sparsity
    if outputs == "one":
        empty = ~jnp.any(mask, axis=_inputs(mask), keepdims=True)
        smallest = jnp.isposinf(protect_outputs(-draws))
        mask = mask | (smallest & empty)
    return mask


def protect_outputs(scores: jax.Array) -> jax.Array:
    """Scores in which the largest of each output channel (last axis) is infinite.

    Channels whose scores are all minus infinity (nothing to choose) stay as they are.
    """
    flat = scores.reshape(-1, scores.shape[-1])
    best = jnp.argmax(flat, axis=0)
    first = jnp.arange(flat.shape[0])[:, None] == best[None, :]
    first = first & jnp.isfinite(flat)
    return jnp.where(first, jnp.inf, flat).reshape(scores.shape)


def exchange(
    mask: jax.Array,
    weights: jax.Array,
    growth: jax.Array,
    *,
    drop: int | jax.Array,
    target: int | jax.Array,
    noise: jax.Array | float = 0.0,
    outputs: Outputs = "any",
) -> jax.Array:
    """Drops small weights and grows others in their place.

    Of the `n` active weights the `n - drop` largest by absolute value stay. Then the
    largest growth scores among all others are set, those just dropped included, until
    the mask has `target` entries; a mask that has as many already grows none.

    Args:
      mask: bool.
      weights: after the step of the optimiser.
      growth: scores >= 0, e.g. the absolute dense gradient.
      drop: how many to drop, int32.
      target: how many there should be, int32.
      noise: added to the absolute weights before they are compared.
      outputs: "one" keeps the largest weight of every output channel first, and grows
        one first in channels that have none.

    Returns:
      The new mask.

    Reference: Mocanu et al., "Scalable training of artificial neural networks with
    adaptive sparse connectivity", Nature Communications 2018 (random growth); Evci et
    al., "Rigging the lottery", ICML 2020 (growth by gradients).
    """
    scores = active_scores(mask, weights, noise=noise, outputs=outputs)
    kept = jnp.sum(mask, dtype=jnp.int32) - jnp.asarray(drop, jnp.int32)
    stay = topk_mask(scores, kept)
    candidates = jnp.where(stay, -jnp.inf, growth.astype(jnp.float32))
    if outputs == "one":
        empty = ~jnp.any(stay, axis=_inputs(stay), keepdims=True)
        candidates = jnp.where(empty, protect_outputs(candidates), candidates)
    places = jnp.maximum(jnp.asarray(target, jnp.int32) - kept, 0)
    grown = topk_mask(candidates, places)
    return stay | grown


def active_scores(
    mask: jax.Array,
    weights: jax.Array,
    *,
    noise: jax.Array | float = 0.0,
    outputs: Outputs = "any",
) -> jax.Array:
    """Absolute weights, minus infinity where the mask is not set; float32."""
    scores = jnp.abs(weights).astype(jnp.float32) + noise
    scores = jnp.where(mask, scores, -jnp.inf)
    return protect_outputs(scores) if outputs == "one" else scores


def _inputs(mask: jax.Array) -> tuple[int, ...]:
    """All axes but that of the output channels."""
    return tuple(range(mask.ndim - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """Which kernels of a network are sparse, and what every mask keeps.

    By default every kernel with two or more axes is, except the first layer that sees
    the image ("stem" or "patches" by its path, else the one convolution with the fewest
    input channels), the classifier ("head") and depthwise convolutions. Class tokens
    and position embeddings are no kernels.

    Attributes:
      dense: patterns (`re.search` on the path) of further kernels that stay dense.
      sparse: patterns of kernels that are sparse though the default leaves them dense.
      rule: "paths" as above; "released" is the rule by names and shapes of the code
        released with Sparse-IFT, for comparison with it. It takes layers with
        `image_channels` inputs for the stem and layers with an axis of `num_classes`
        for the classifier, wherever they are.
      image_channels: of the images, for the rule "released".
      num_classes: for the rule "released", which needs it.
      outputs: "one" keeps at least one weight of every output channel, where the count
        of a layer allows it.

    Raises:
      ValueError: a pattern that is no regular expression; "released" without
        `num_classes` or with patterns.
    """

    dense: tuple[str, ...] | list[str] = ()
    sparse: tuple[str, ...] | list[str] = ()
    rule: Literal["paths", "released"] = "paths"
    image_channels: int = 3
    num_classes: int | None = None
    outputs: Outputs = "any"

    def __post_init__(self) -> None:
        """Checks the options against each other."""
        for pattern in (*self.dense, *self.sparse):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"scope: {pattern!r} is no regular expression: {error}"
                ) from error
        if self.rule == "released":
            if self.num_classes is None:
                raise ValueError("scope: rule='released' needs num_classes")
            if self.dense or self.sparse:
                raise ValueError(
                    "scope: rule='released' takes no patterns; leave dense and sparse "
                    "out or take rule='paths'"
                )

    def select(self, arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shapes of the sparse kernels by path, in the order of the paths.

        Args:
          arrays: the network's parameters (anything with a shape) by path.

        Raises:
          ValueError: a pattern matches no kernel, nothing is left to be sparse, or the
            first convolution cannot be told.
        """
        shapes = {path: tuple(x.shape) for path, x in sorted(arrays.items())}
        if self.rule == "released":
            chosen = released_rule(
                shapes,
                image_channels=self.image_channels,
                num_classes=self.num_classes or 0,
            )
        else:
            chosen = self._by_paths(shapes)
        if not chosen:
            raise ValueError(
                f"no kernel is left to be sparse among the parameters "
                f"{_some(shapes)}; name one in scope.sparse"
            )
        return {path: shapes[path] for path in chosen}

    def _by_paths(self, shapes: Shapes) -> list[str]:
        kernels = {p: s for p, s in shapes.items() if is_kernel(p, s)}
        for option in ("dense", "sparse"):
            for pattern in getattr(self, option):
                if not any(re.search(pattern, path) for path in kernels):
                    raise ValueError(
                        f"scope.{option}: {pattern!r} matches no kernel; they are "
                        f"{_some(kernels)}"
                    )
        dense = {path for path in kernels if _matches(path, self.dense)}
        sparse = {path for path in kernels if _matches(path, self.sparse)} - dense
        usual = {path for path in kernels if _matches(path, (STEM, HEAD))}
        usual |= {path for path, shape in kernels.items() if is_depthwise(shape)}
        if not any(re.search(STEM, path) for path in kernels):
            usual |= _first_convolution(kernels, known=dense | sparse)
        return [path for path in kernels if path not in dense | (usual - sparse)]


def is_kernel(path: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is a kernel by its name and has at least two axes."""
    return len(shape) > 1 and "kernel" in path.rpartition("/")[2]


def is_depthwise(shape: Sequence[int]) -> bool:
    """Whether a kernel `[height, width, 1, out]` sees one channel per output."""
    return len(shape) == 4 and shape[-2] == 1


def is_head(path: str) -> bool:
    """Whether a parameter belongs to the classifier, by its path."""
    return re.search(HEAD, path) is not None


def released_rule(
    shapes: Shapes, *, image_channels: int, num_classes: int
) -> list[str]:
    """The sparse parameters by the rule of the code released with Sparse-IFT.

    Sparse is what has more than one axis, unless its path holds "stem" or its number of
    input channels is that of the image; its path holds "head" or one of its axes has
    the length of the number of classes; or its path holds "norm", "cls_token" or
    "pos_embed".

    Args:
      shapes: of all parameters, kernels as `[height, width, in, out]` or `[in, out]`.
      image_channels: of the images.
      num_classes: of the data.

    Reference: Thangarasa et al., "Sparse-IFT: sparse iso-FLOP transformations for
    maximizing training efficiency", ICML 2024 (code).
    """
    names = ("stem", "head", "norm", "cls_token", "pos_embed")
    return [
        path
        for path, shape in shapes.items()
        if len(shape) > 1
        and not any(name in path for name in names)
        and shape[-2] != image_channels
        and num_classes not in shape
    ]


def _first_convolution(kernels: Shapes, known: set[str]) -> set[str]:
    """The convolution with the fewest input channels.

    Raises:
      ValueError: several have as few, and none of them is known from a pattern.
    """
    inputs = {path: s[-2] for path, s in kernels.items() if len(s) == 4}
    if list(inputs.values()).count(1) > 1:
        # Depthwise convolutions, which are no first layers.
        inputs = {path: n for path, n in inputs.items() if n > 1}
    fewest = {path for path, n in inputs.items() if n == min(inputs.values())}
    if len(fewest) > 1 and not fewest & known:
        raise ValueError(
            "cannot tell the first convolution: "
            f"{' and '.join(sorted(fewest)[:3])} have {inputs[min(fewest)]} input "
            "channels each; name it in scope.dense (or scope.sparse)"
        )
    return fewest if len(fewest) == 1 else set()


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)


def _some(paths: Iterable[str], count: int = 4) -> str:
    """A few paths for a message."""
    paths = list(paths)
    more = f" and {len(paths) - count} more" if len(paths) > count else ""
    return ", ".join(paths[:count]) + more if paths else "(none)"
