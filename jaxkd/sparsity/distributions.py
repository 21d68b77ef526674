"""How the sparsity of a network is shared among its layers.

Every function maps shapes by path to densities by path (the share of a layer's numbers
that take part), in float64 on the host. Kernels are `[height, width, in, out]` or
`[in, out]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from jaxkd.sparsity.masks import Shapes, is_head

Distribution = Literal["uniform", "er", "erk", "uniform+", "er+", "erk+"]

# What "+" leaves of the classifier at least.
_HEAD_DENSITY = 0.2


def densities(
    shapes: Shapes,
    sparsity: float,
    *,
    distribution: Distribution = "uniform",
    power: float = 1.0,
) -> dict[str, float]:
    """The density of every layer.

    "uniform" gives all the same; "er" and "erk" see `er` and `erk`. With "+" the
    classifier ("head" by its path) has a sparsity of at most 0.8; the others are not
    made sparser for it.

    Args:
      shapes: of the sparse kernels by path.
      sparsity: of all of them together, in [0, 1).
      distribution: see above.
      power: of the raw densities of "er" and "erk" (`erk_power_scale`).

    Raises:
      ValueError: a sparsity outside [0, 1).
    """
    kind = distribution.removesuffix("+")
    if kind == "uniform":
        check_sparsity(sparsity)
        found = dict.fromkeys(shapes, 1.0 - sparsity)
    else:
        found = {"er": er, "erk": erk}[kind](shapes, sparsity, power=power)
    if distribution.endswith("+"):
        found = {
            path: max(density, _HEAD_DENSITY) if is_head(path) else density
            for path, density in found.items()
        }
    return found


def er(shapes: Shapes, sparsity: float, *, power: float = 1.0) -> dict[str, float]:
    """Erdos-Renyi densities, `eps * ((in + out) / (in * out)) ** power`.

    Thin layers are denser. `eps` makes the sum of the non-zeros `(1 - s)` of all; a
    layer that would exceed density 1 (and those tied with the largest) becomes dense
    and `eps` is solved again for the others.

    Args:
      shapes: by path.
      sparsity: of all together, in [0, 1).
      power: see the formula.

    Raises:
      ValueError: a sparsity outside [0, 1).

    Reference: Mocanu et al., "Scalable training of artificial neural networks with
    adaptive sparse connectivity", Nature Communications 2018.
    """
    return _solve(
        shapes, sparsity, lambda s: (sum(s[-2:]) / math.prod(s[-2:])) ** power
    )


def erk(shapes: Shapes, sparsity: float, *, power: float = 1.0) -> dict[str, float]:
    """Erdos-Renyi-kernel densities, `eps * (sum(shape) / prod(shape)) ** power`.

    As `er` with all axes of the kernel, so that small kernels are denser as well.

    Args:
      shapes: by path.
      sparsity: of all together, in [0, 1).
      power: see the formula.

    Raises:
      ValueError: a sparsity outside [0, 1).

    Reference: Evci et al., "Rigging the lottery: making all tickets winners", ICML
    2020.
    """
    return _solve(shapes, sparsity, lambda s: (sum(s) / math.prod(s)) ** power)


def overall(shapes: Shapes, layer_densities: Mapping[str, float]) -> float:
    """The density of all layers together."""
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    kept = math.fsum(size * layer_densities[path] for path, size in sizes.items())
    return kept / sum(sizes.values())


def sparsity_of(density: float) -> float:
    """`1 - density`, without the last bits that two subtractions leave."""
    return round(1.0 - density, 12)


def check_sparsity(sparsity: float, name: str = "sparsity") -> None:
    """Raises a ValueError unless `0 <= sparsity < 1`."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {sparsity}")


def _solve(
    shapes: Shapes, sparsity: float, raw_density: Callable[[Sequence[int]], float]
) -> dict[str, float]:
    check_sparsity(sparsity)
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    raw = {path: raw_density(shape) for path, shape in shapes.items()}
    wanted = (1.0 - sparsity) * sum(sizes.values())
    free, factor = set(shapes), 1.0
    while free:
        rest = wanted - sum(sizes[path] for path in sizes if path not in free)
        factor = rest / sum(raw[path] * sizes[path] for path in sizes if path in free)
        largest = max(raw[path] for path in free)
        if factor * largest <= 1.0:
            break
        free = {path for path in free if raw[path] != largest}
    return {path: factor * raw[path] if path in free else 1.0 for path in shapes}
