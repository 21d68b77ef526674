"""When masks change, by how much, and how sparse they are to be by then.

Steps of the optimiser are counted from 1: step `t` is the `t`-th of the stage. What is
known before training starts is computed on the host in float64, so that counts of
weights come out as in the equations and not one off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Anneal = Literal["constant", "cosine", "exponential", "power"]


def window(total_steps: int, begin: float = 0.0, end: float = 0.75) -> tuple[int, int]:
    """The first and the last step of a part of a stage, `int(fraction * total)`.

    Args:
      total_steps: of the stage.
      begin: the fraction of them that comes before.
      end: the fraction at which it is over.
    """
    return int(begin * total_steps), int(end * total_steps)


def check_window(begin: float, end: float, frequency: int) -> None:
    """Raises a ValueError unless `0 <= begin < end <= 1` and `frequency >= 1`."""
    if not 0.0 <= begin < end <= 1.0:
        raise ValueError(
            f"begin and end must be fractions with 0 <= begin < end <= 1, got {begin} "
            f"and {end}"
        )
    if frequency < 1:
        raise ValueError(f"frequency must be at least 1 step, got {frequency}")


def steps_between(begin: int, end: int, frequency: int) -> np.ndarray:
    """The steps `t` with `begin < t < end` that are multiples of the frequency."""
    return np.arange(frequency * (begin // frequency + 1), end, frequency)


def steps_until(begin: int, end: int, frequency: int) -> np.ndarray:
    """As `steps_between`, and the end itself, so that a ramp arrives."""
    return np.append(steps_between(begin, end, frequency), end)


def cubic_sparsity(
    step: Any, *, initial: float, final: float, begin: int, end: int
) -> np.ndarray:
    """`s = s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))**3`, constant outside.

    Args:
      step: `t`, of any shape.
      initial: the sparsity `s_i` up to `begin`.
      final: the sparsity `s_f` from `end` on.
      begin: first step of the ramp.
      end: its last step.

    Returns:
      float64 in the shape of `step`.

    Reference: Zhu and Gupta, "To prune, or not to prune", ICLR 2018 workshop, Eq. 1.
    """
    passed = np.asarray(step, np.float64) - begin
    left = 1.0 - np.clip(passed / max(end - begin, 1), 0.0, 1.0)
    return np.asarray(final + (initial - final) * left**3)


def drop_fraction(
    step: Any,
    *,
    initial: float = 0.3,
    begin: int = 0,
    end: int,
    anneal: Anneal = "cosine",
    exponent: float = 1.0,
) -> np.ndarray:
    """The share of the active weights that an exchange drops.

    With `x = (t - begin) / (end - begin)`: "constant" is the initial share; "cosine"
    has the factor `(cos(pi x) + 1) / 2`, "exponential" `exp(-e x)`, "power"
    `(1 - x)**e` (what the code of RigL's authors calls exponential).

    Args:
      step: `t`, of any shape; outside the window it counts as its nearer end.
      initial: the share at `begin`.
      begin: where annealing starts.
      end: where it ends.
      anneal: see above.
      exponent: `e`.

    Returns:
      float64 in the shape of `step`.

    Reference: Evci et al., "Rigging the lottery: making all tickets winners", ICML
    2020 (cosine); Dettmers and Zettlemoyer, "Sparse networks from scratch: faster
    training without losing performance", 2019.
    """
    length = max(end - begin, 1)
    passed = np.clip(np.asarray(step, np.float64) - begin, 0.0, length)
    # In this order, and by the C library: the last bit can decide a count.
    factor = {
        "constant": lambda t: 1.0,
        "cosine": lambda t: math.cos(math.pi * t / length) * 0.5 + 0.5,
        "exponential": lambda t: math.exp(-exponent * t / length),
        "power": lambda t: (1.0 - t / length) ** exponent,
    }[anneal]
    return np.asarray(initial * np.vectorize(factor, otypes=[np.float64])(passed))


def share_of(fractions: Any, index: jax.Array, count: jax.Array) -> jax.Array:
    """`int(fractions[index] * count)`, exactly as in float64 on the host.

    In float32, `0.15 * 100` may be 15.000001 or 14.999999; one weight more or less
    would be dropped.

    Args:
      fractions: float64 on the host, `[updates]`.
      index: which of them, int32.
      count: int32.

    Returns:
      int32.
    """
    with jax.enable_x64(True):
        fraction = jnp.asarray(fractions, jnp.float64)[index]
        return (fraction * count.astype(jnp.float64)).astype(jnp.int32)


def at_steps(
    steps: Sequence[int] | np.ndarray,
    step: jax.Array,
    change: Callable[[jax.Array, Any], Any],
    values: Any,
) -> Any:
    """Changes values at some steps and leaves them as they are at all others.

    The change is one branch of `lax.cond`, so that what it sorts costs nothing at other
    steps. (Under `vmap` over seeds both branches run at every step.)

    Args:
      steps: increasing, on the host.
      step: the step of now, int32.
      change: `change(i, values)` at `steps[i]`; returns the like of `values`.
      values: any tree of arrays.
    """
    if not len(steps):
        return values
    table = jnp.asarray(steps, jnp.int32)
    index = jnp.minimum(jnp.searchsorted(table, step), len(steps) - 1)
    return jax.lax.cond(
        table[index] == step,
        lambda values: change(index, values),
        lambda values: values,
        values,
    )
