"""L-GreCo: how much to compress each layer, by dynamic programming on the host.

Of all choices whose error is at most that of the uniform one, the smallest.
Alimohammadi, Markov, Frantar and Alistarh, L-GreCo: Layerwise-Adaptive Gradient
Compression for Efficient Data-parallel Deep Learning, 2022; details follow the released
code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

BUCKETS = 10_000


def lgreco_ranks(
    gradients: Mapping[str, np.ndarray],
    *,
    base_rank: int = 4,
    alpha: float = 1.0,
    previous: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The rank of each layer for `powersgd`.

    Args:
      gradients: averaged over some steps, as matrices `[n, m]`, by path.
      base_rank: the uniform rank; candidates are from half of it to twice of it.
      alpha: factor of the error of the uniform rank that is allowed.
      previous: what is kept if no choice is good enough; the base rank by default.

    Returns:
      The ranks, at most `min(n, m)`.

    Raises:
      ValueError: an impossible option, or a gradient that is no matrix.
    """
    if base_rank < 1:
        raise ValueError(f"base_rank must be >= 1, got {base_rank}")
    candidates = candidate_ranks(base_rank)
    errors, sizes = rank_tables(list(gradients.values()), candidates)
    base = candidates.index(base_rank)
    limits = {path: min(g.shape) for path, g in gradients.items()}
    kept = previous or dict.fromkeys(gradients, base_rank)
    chosen = choose(errors, sizes, base=base, alpha=alpha)
    if chosen is None:
        return {path: min(kept[path], limits[path]) for path in gradients}
    return {
        path: min(candidates[i], limits[path])
        for path, i in zip(gradients, chosen, strict=True)
    }


def candidate_ranks(base_rank: int) -> list[int]:
    """From `floor(base / 2)`, at least 1, to `2 base`."""
    return list(range(max(base_rank // 2, 1), 2 * base_rank + 1))


def rank_tables(
    matrices: Sequence[np.ndarray], ranks: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Errors and sizes of the best approximations of each rank.

    Args:
      matrices: `[n, m]`.
      ranks: the candidates.

    Returns:
      Frobenius errors and numbers to send, `rank (n + m)`, `[layers, ranks]`, float64.
      A rank above `min(n, m)` has the size of that one and one more.
    """
    errors = np.zeros((len(matrices), len(ranks)))
    sizes = np.zeros_like(errors)
    for i, matrix in enumerate(matrices):
        if np.ndim(matrix) != 2:
            raise ValueError(f"gradients must be matrices, got shape {matrix.shape}")
        n, m = matrix.shape
        if np.isfinite(matrix).all():
            values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        else:
            values = np.full(min(n, m), np.inf)
        for j, rank in enumerate(ranks):
            errors[i, j] = np.sqrt(np.sum(np.square(values[rank:])))
            over = rank > min(n, m)
            sizes[i, j] = min(rank, n, m) * (n + m) + over
    return errors, sizes


def ratio_tables(
    gradients: Sequence[np.ndarray], ratios: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Errors and sizes if the share `ratio` of largest numbers is sent, as by `dgc`.

    Args:
      gradients: of any shape.
      ratios: the candidates, in (0, 1].

    Returns:
      Norms of what is not sent, and 32-bit words of values and places,
      `[layers, ratios]`, float64.
    """
    errors = np.zeros((len(gradients), len(ratios)))
    sizes = np.zeros_like(errors)
    for i, gradient in enumerate(gradients):
        squares = np.sort(np.square(np.ravel(gradient).astype(np.float64)))[::-1]
        for j, ratio in enumerate(ratios):
            count = max(math.ceil(ratio * squares.size), 1)
            errors[i, j] = np.sqrt(np.sum(squares[count:]))
            sizes[i, j] = 2 * count if ratio < 1 else squares.size
    return errors, sizes


def bit_tables(
    gradients: Sequence[np.ndarray], bits: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Errors and sizes if numbers are rounded to so many bits, as by `quantized`.

    Args:
      gradients: of any shape.
      bits: the candidates, 2 or more.

    Returns:
      Norms of the rounding errors, and bits, `[layers, bits]`, float64.
    """
    errors = np.zeros((len(gradients), len(bits)))
    sizes = np.zeros_like(errors)
    for i, gradient in enumerate(gradients):
        x = np.asarray(gradient, np.float64)
        for j, count in enumerate(bits):
            scale = np.abs(x).max() / (2 ** (count - 1) - 1)
            rest = x - scale * np.round(x / scale) if scale else x
            errors[i, j] = np.sqrt(np.sum(np.square(rest)))
            sizes[i, j] = count * x.size
    return errors, sizes


def discretise(errors: np.ndarray, budget: float) -> np.ndarray:
    """Errors as numbers of buckets: `clip(ceil(error / (budget / 10000)), 1, 10000)`.

    What is no number, or more than the budget, takes all of them.

    Args:
      errors: of any shape.
      budget: above 0.

    Returns:
      int64 in the same shape.
    """
    with np.errstate(over="ignore"):
        buckets = np.ceil(errors / (budget / BUCKETS))
    buckets = np.nan_to_num(buckets, nan=BUCKETS, posinf=BUCKETS)
    return np.clip(buckets, 1, BUCKETS).astype(np.int64)


def choose(
    errors: np.ndarray, sizes: np.ndarray, *, base: int, alpha: float = 1.0
) -> list[int] | None:
    """The choice for each layer whose total size is smallest within the error budget.

    The budget is `alpha` times the sum of the errors of the uniform choice `base`. As
    in the released code the first layer must stay strictly below its bucket, so that
    all together fill at most 9999 of the 10000 buckets.

    Args:
      errors: of each layer and candidate, `[layers, candidates]`.
      sizes: in the same shape.
      base: the candidate of the uniform scheme.
      alpha: factor of its error.

    Returns:
      The candidate of each layer, the first of equals; None if the budget is zero or
      not finite, or no choice is within it: what was chosen before should stay.

    Raises:
      ValueError: shapes that do not fit, or `alpha` not above 0.
    """
    if errors.ndim != 2 or errors.shape != sizes.shape or not errors.size:
        raise ValueError(
            "errors and sizes must be [layers, candidates] alike, got "
            f"{errors.shape} and {sizes.shape}"
        )
    if not 0 <= base < errors.shape[1]:
        raise ValueError(f"base must be a candidate's index, got {base}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be > 0 and finite, got {alpha}")
    budget = alpha * float(errors[:, base].sum())
    if not 0 < budget < math.inf:
        return None
    buckets = discretise(errors, budget)
    layers, candidates = errors.shape
    # best[t]: the smallest size of the layers so far that fill at most t buckets.
    best = np.zeros(BUCKETS + 1)
    best[0] = math.inf
    picked = np.full((layers, BUCKETS + 1), -1)
    for layer in range(layers):
        new = np.full(BUCKETS + 1, math.inf)
        for candidate in range(candidates):
            filled = buckets[layer, candidate]
            sums = np.full(BUCKETS + 1, math.inf)
            sums[filled:] = best[: BUCKETS + 1 - filled] + sizes[layer, candidate]
            better = sums < new
            new[better] = sums[better]
            picked[layer, better] = candidate
        best = new
    if not math.isfinite(best[BUCKETS]):
        return None
    left, chosen = BUCKETS, []
    for layer in reversed(range(layers)):
        chosen.append(int(picked[layer, left]))
        left -= buckets[layer, chosen[-1]]
    return chosen[::-1]
