"""Sizes of sparse layers that cost as much as the dense layers they replace.

A layer with a k x k kernel from f_in to f_out channels costs k^2 f_in f_out products
per output pixel. At a sparsity s, the share of zeros, the following cost the same:

    wide        both widths times kappa         (1 - s) kappa^2 = 1
    parallel    B branches, summed              (1 - s) B = 1
    factorized  k x k to r, then 1x1 to f_out   (1 - s) r (k^2 f_in + f_out)
                                                    = k^2 f_in f_out
    doped       the sparse layer plus a dense   r (k^2 f_in + f_out)
                factorized one of rank r            = s k^2 f_in f_out

Only the number of products is equal. Dense hardware computes the zeros as well: there,
a sparse layer costs as much time as its size without zeros.

Reference: Thangarasa, Saxena, Gupta, Lie, "Sparse-IFT: Sparse Iso-FLOP Transformations
for Maximizing Training Efficiency", ICML 2024, and the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

# How far the cost of a wide or parallel layer may be from the dense one's.
TOLERANCE = 0.01


def branches(sparsity: float) -> int:
    """The number of parallel branches, `round(1 / (1 - s))`, half to even.

    Args:
      sparsity: share of zeros, from 0 to below 1.

    Raises:
      ValueError: another sparsity.

    >>> branches(0.75)
    4
    """
    check_sparsity(sparsity)
    return round(1 / (1 - sparsity))


def widening(sparsity: float) -> float:
    """The factor of all widths, `kappa = sqrt(branches(s))`.

    Raises:
      ValueError: a sparsity outside of 0 to below 1.
    """
    return math.sqrt(branches(sparsity))


def wide_features(features: int, *, sparsity: float, base: int = 64) -> int:
    """A width in the wide network.

    Multiples of the base width stay multiples, `features / base * int(base * kappa)`,
    so that stages keep their ratios; other widths become `int(features * kappa)`.

    Args:
      features: the width in the dense network.
      sparsity: share of zeros.
      base: the width of the first stage, or another unit of all widths.

    Raises:
      ValueError: a sparsity outside of 0 to below 1.

    >>> [wide_features(64 * n, sparsity=0.5) for n in (1, 2, 4, 8)]
    [90, 180, 360, 720]
    """
    factor = widening(sparsity)
    times, rest = divmod(features, base)
    return int(features * factor) if rest else times * int(base * factor)


def factorized_rank(
    f_in: int,
    f_out: int,
    *,
    sparsity: float,
    taps: int = 9,
    groups: int = 1,
    second_dense: bool = False,
) -> int:
    """The rank of a sparse factorized layer, rounded up.

    Args:
      f_in: input channels.
      f_out: output channels.
      sparsity: share of zeros in both factors.
      taps: pixels of the kernel, k^2.
      groups: of the convolution; both factors have as many, and each its share of
        the rank.
      second_dense: whether the 1x1 factor stays dense.

    Raises:
      ValueError: a sparsity outside of 0 to below 1.

    >>> factorized_rank(64, 64, sparsity=0.5), factorized_rank(64, 64, sparsity=0.9)
    (116, 577)
    """
    check_sparsity(sparsity)
    f_in, f_out = f_in // groups, f_out // groups
    if second_dense:
        cost = (1 - sparsity) * taps * f_in + f_out
    else:
        cost = (1 - sparsity) * (taps * f_in + f_out)
    return groups * math.ceil(taps * f_in * f_out / cost)


def doped_rank(
    f_in: int, f_out: int, *, sparsity: float, taps: int = 9, groups: int = 1
) -> int:
    """The rank of the dense term beside a sparse layer, rounded down; it may be 0.

    Args:
      f_in: input channels.
      f_out: output channels.
      sparsity: share of zeros in the sparse layer.
      taps: pixels of the kernel, k^2.
      groups: of the convolution; both factors have as many.

    Raises:
      ValueError: a sparsity outside of 0 to below 1.

    >>> doped_rank(64, 64, sparsity=0.75)
    43
    """
    check_sparsity(sparsity)
    f_in, f_out = f_in // groups, f_out // groups
    rank = sparsity * taps * f_in * f_out / (taps * f_in + f_out)
    return groups * math.floor(rank)


def check_sparsity(sparsity: float) -> None:
    """Checks that a sparsity is a share that leaves something.

    Raises:
      ValueError: below 0, or 1 and more.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be >= 0 and < 1, got {sparsity}")


def check_branches(sparsity: float) -> None:
    """Checks that a whole number of branches costs what one dense layer does.

    Raises:
      ValueError: it is off by more than a hundredth; the message names the nearest
        sparsities that fit.
    """
    count = branches(sparsity)
    cost = count * (1 - sparsity)
    if abs(cost - 1) > TOLERANCE:
        below = math.floor(1 / (1 - sparsity))
        fits = [1 - 1 / n for n in (below, below + 1)]
        raise ValueError(
            f"sparsity {sparsity} is not iso-FLOP: {count} branches cost {cost:.3g} of "
            f"the dense layer; take {fits[0]:.4g} or {fits[1]:.4g}, or set "
            "any_cost=True"
        )


def search_sparsity(
    cost: Callable[[float], int],
    budget: int,
    *,
    step: float = 1e-4,
    tolerance: float = 1e-3,
) -> float:
    """The sparsity at which a network meets a budget, by bisection on [0, 0.9999].

    The order of the authors' search is kept: bounds move past the middle by `step`, and
    the first sparsity within the tolerance is taken.

    Args:
      cost: the cost at a sparsity; it falls as the sparsity rises.
      budget: what the network may cost.
      step: how far bounds move past the middle.
      tolerance: the share of the budget by which the cost may be off.

    Raises:
      ValueError: no sparsity meets the budget.

    >>> search_sparsity(lambda s: int(2000 * (1 - s)), 1000)
    0.49995
    """
    low, high = 0.0, 0.9999
    middle, found = 0.0, 0
    while low <= high:
        middle = (low + high) / 2
        found = cost(middle)
        if abs(found - budget) <= tolerance * budget:
            return middle
        if found > budget:
            low = middle + step
        else:
            high = middle - step
    # Narrow networks move in steps coarser than the tolerance.
    if abs(found - budget) <= TOLERANCE * budget:
        return middle
    raise ValueError(
        f"no sparsity makes the network cost {budget}: at {middle:.4f} it costs {found}"
    )


def static_training_flops(forward: float) -> float:
    """Operations of a training step with the forward pass's: three times as many.

    With the dense forward pass this is dense training, with the sparse one training
    with a mask that stays.
    """
    return 3 * forward


def rigl_training_flops(sparse: float, dense: float, *, every: int = 100) -> float:
    """Operations of a training step of RigL, on average, while masks still change.

    `(3 F_s T + 2 F_s + F_dense) / (T + 1)`: every T steps the gradient of the kernels
    is computed densely.

    Args:
      sparse: F_s, of the forward pass with masks.
      dense: F_dense, of the same network without masks.
      every: T, steps between two updates of the masks.

    Raises:
      ValueError: `every` below 1.

    Reference: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML
    2020.
    """
    if every < 1:
        raise ValueError(f"every must be >= 1, got {every}")
    return (3 * sparse * every + 2 * sparse + dense) / (every + 1)
