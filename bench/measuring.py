"""What the scripts here share: turns, spreads, what is told, and how mistakes end.

A *side* is one way to do some work. Sides take turns within one process, round by
round, so that whatever disturbs the machine disturbs all of them; medians over rounds
are compared. Every script prints one JSON line; a mistake ends it with status 2 and one
line on standard error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "torch")
DEVICES = ("cpu", "gpu")
# More processes than this wanted a core: others work on the machine.
_BUSY = 0.5


class Mistake(Exception):
    """A wrong option, or something that is missing; one line for the user."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake by one line instead of usage lines and an exit.

    Args:
      script: the name of the file.
      about: its docstring, whose first paragraph is shown by `--help`.
    """

    def __init__(self, script: str, about: str | None):
        super().__init__(
            prog=f"python bench/{script}",
            description=(about or "").split("\n\n")[0],
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message}; see --help")


def end(script: Callable[[Sequence[str] | None], Any], arguments: Any = None) -> int:
    """Runs a script's function, prints what it returns as one line of JSON.

    Returns:
      The exit status: 2 if it was a mistake, else 0.
    """
    try:
        print(json.dumps(finite(script(arguments))))
    except Mistake as mistake:
        print(" ".join(str(mistake).split()), file=sys.stderr)
        return 2
    return 0


def report(
    options: Any, work: Callable[[Any], Mapping[str, Any]], *, elsewhere: bool = False
) -> dict[str, Any]:
    """Measures, and adds where that was: device, load and versions.

    Args:
      options: of the script. This process gets their `device`, the CPU where they have
        none, and their `threads`, if they have some.
      work: measures by the options.
      elsewhere: other processes need the device; this one uses it after the work.

    Raises:
      Mistake: there is no such device, or there are not so many cores.
    """
    busy = load()
    if hasattr(options, "threads"):
        limit_threads(options.threads)
    device = getattr(options, "device", "cpu")
    if not elsewhere:
        use_device(device)
    result = work(options)
    if elsewhere:
        use_device(device)
    return {**result, **conditions(device, busy)}


def conditions(device: str, busy: float | None) -> dict[str, Any]:
    """Where something was measured; `busy` is the load before it."""
    return {"device": device_name(device), "load": busy, "versions": versions()}


def finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def at_least(options: Any, least: float, *names: str) -> None:
    """Checks options of the command line by their attribute names.

    Raises:
      Mistake: one is smaller.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise Mistake(
                f"--{name.replace('_', '-')} must be at least {least}, got {value}"
            )


def need(package: str, why: str) -> None:
    """Checks that an optional package is installed.

    Raises:
      Mistake: it is not; `why` ends the line.
    """
    if importlib.util.find_spec(package) is None:
        raise Mistake(f"{package} is not installed; {why}")


# -------------------------------------------------------------------------------- turns


class Diverged(FloatingPointError):
    """The loss of a side is not finite.

    Args:
      side: its name.
      loss: the value.
    """

    def __init__(self, side: str, loss: float):
        super().__init__(f"{side}: the loss is {loss}")
        self.side = side


class Side(NamedTuple):
    """One way to do the work.

    Attributes:
      run: makes so many calls, waits for them and returns the last loss (any number
        that must be finite).
      images: of one call.
      calls: of one round.
    """

    run: Callable[[int], float]
    images: int
    calls: int


def take_turns(
    sides: Mapping[str, Side],
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Images per second of every side in every round.

    Raises:
      Diverged: the loss of a side is not finite.
    """
    for side in sides.values():
        side.run(1)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            # An untimed call wakes this side's threads and fills its caches.
            side.run(1)
            start = clock()
            loss = side.run(side.calls)
            rates[name].append(side.calls * side.images / (clock() - start))
            if not math.isfinite(loss):
                raise Diverged(name, loss)
        shown = ", ".join(f"{k} {v[-1]:.1f}" for k, v in rates.items())
        print(f"round {number + 1} of {rounds}, images/s: {shown}", file=sys.stderr)
    return rates


def spread(values: Sequence[float], digits: int = 2) -> dict[str, Any]:
    """The median of some rounds, the extremes, and the rounds."""
    return {
        "median": round(statistics.median(values), digits),
        "low": round(min(values), digits),
        "high": round(max(values), digits),
        "rounds": [round(value, digits) for value in values],
    }


def ratio_of(values: Sequence[float], others: Sequence[float]) -> float:
    """The ratio of two medians."""
    return round(statistics.median(values) / statistics.median(others), 4)


# ------------------------------------------------------------------------ where it runs


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_threads(threads: int) -> None:
    """Leaves `threads` cores to this process; XLA makes one thread for each.

    Must come before the first use of JAX.

    Raises:
      Mistake: there are not so many, or the system cannot do it.
    """
    if threads > usable_cores():
        raise Mistake(
            f"--threads {threads}, but this process may use {usable_cores()} cores"
        )
    if threads == usable_cores():
        return
    if not hasattr(os, "sched_setaffinity"):
        raise Mistake("--threads needs sched_setaffinity, which only Linux has")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def use_device(device: str) -> None:
    """Makes JAX compute there; call it before the first use of JAX.

    Raises:
      Mistake: JAX has no such device.
    """
    # PyTorch, in the same process, needs memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    import jax

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    found = jax.devices()[0].platform
    if found != device:
        raise Mistake(
            f"--device={device}, but JAX computes on {found}; install jax[cuda13], or "
            "take --device=cpu"
        )


def device_name(device: str) -> str:
    """The device in words."""
    if device == "cpu":
        return f"cpu ({cpu_name()})"
    import jax

    return f"{len(jax.devices())} x {jax.devices()[0].device_kind}"


def cpu_name() -> str:
    """The processor in words, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def load() -> float | None:
    """Processes that wanted a core during the last minute; None where unknown.

    A busy machine is told on standard error: its numbers mean little.
    """
    if not hasattr(os, "getloadavg"):
        return None
    busy = round(os.getloadavg()[0], 2)
    if busy > _BUSY:
        print(
            f"other work on this machine (load {busy}) makes the numbers unreliable",
            file=sys.stderr,
        )
    return busy


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, where installed."""
    import jaxkd

    found = {"python": platform.python_version(), "jaxkd": jaxkd.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
