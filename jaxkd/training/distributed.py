"""Several processes as one run: how they meet, agree and part.

Every process runs the same command. Once they are connected, `jax.devices()` are those
of all of them, and all run the same programs in the same order. Process 0 alone writes
and tells; a process that cannot go on says why and ends without waiting for the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxkd.training.schema import ConfigError, one_line

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# A process that dies without a word is missed after so many seconds.
_HEARTBEAT_SECONDS = 60
# How long one that fails waits for others that fail as well, to end together.
_PARTING_SECONDS = 5.0


class DistributedError(Exception):
    """The processes cannot meet; the text is one line for the user."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Where processes meet; what is None is found out by JAX.

    Attributes:
      address: `host:port` of process 0.
      count: how many processes there are.
      index: which one this is.
    """

    address: str | None = None
    count: int | None = None
    index: int | None = None

    def __post_init__(self):
        if self.address is not None:
            host, colon, port = self.address.rpartition(":")
            if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
                raise ValueError(f"{self.address!r} is no HOST:PORT")
        if self.count is not None and self.count < 1:
            raise ValueError(f"the number of processes must be >= 1, got {self.count}")
        if self.count is not None and self.index is not None:
            if not 0 <= self.index < self.count:
                raise ValueError(
                    f"process {self.index} of {self.count}; they are counted from 0"
                )


def parse_processes(flag: str | None, environ: Mapping[str, str]) -> Processes | None:
    """Reads `--distributed` and, without it, the environment.

    Args:
      flag: "off", "auto" (JAX looks for SLURM, Open MPI, Cloud TPU or Kubernetes), or
        "HOST:PORT,COUNT,INDEX"; None reads the variables JAX_COORDINATOR_ADDRESS,
        JAX_NUM_PROCESSES and JAX_PROCESS_ID, if they are set.
      environ: the environment.

    Returns:
      Where to meet; None for a run of one process.

    Raises:
      ConfigError: the flag or the variables cannot be read.
    """
    if flag == "off":
        return None
    if flag == "auto":
        return Processes()
    if flag is not None:
        parts = flag.split(",")
        if len(parts) != 3:
            raise ConfigError(
                f"--distributed: must be off, auto or HOST:PORT,COUNT,INDEX, got {flag}"
            )
        return _processes("--distributed", *parts)
    missing = [name for name in _VARIABLES if not environ.get(name)]
    if len(missing) == len(_VARIABLES):
        return None
    if missing:
        raise ConfigError(
            f"environment: {missing[0]} is not set, but other variables of a run of "
            f"several processes are; set {', '.join(_VARIABLES)}, or --distributed=off"
        )
    return _processes("environment", *(environ[name] for name in _VARIABLES))


def _processes(where: str, address: str, count: str, index: str) -> Processes:
    try:
        return Processes(address=address, count=int(count), index=int(index))
    except ValueError as error:
        raise ConfigError(f"{where}: {one_line(error)}") from error


def connect(processes: Processes, *, timeout_seconds: int = 300) -> None:
    """Meets the other processes; must come before the first use of a device.

    Raises:
      ConfigError: no cluster is found.
      DistributedError: the others do not come, or process 0 cannot be reached.
    """
    known = processes.address is not None
    # JAX's reader of the environment would add what this run was not given.
    method = "deactivate" if known else None
    try:
        jax.distributed.initialize(
            processes.address,
            processes.count,
            processes.index,
            cluster_detection_method=method,
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise ConfigError(
            "--distributed=auto: no SLURM, Open MPI, Cloud TPU or Kubernetes found "
            f"({one_line(error)}); give HOST:PORT,COUNT,INDEX"
        ) from error
    except RuntimeError as error:
        place = f" at {processes.address}" if known else ""
        raise DistributedError(
            f"the processes did not meet{place} within {timeout_seconds} s "
            f"({one_line(error)[:200]}); are all of them started, is the port free, "
            "and can it be reached?"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # JAX's own handler would swallow the signal; the loop installs another.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def leave(status: int) -> None:
    """Ends a process that failed, without waiting for others that did not.

    Those notice that it is gone, from their next exchange or from its heartbeat. When
    all fail alike, they end together.

    Args:
      status: the exit status.
    """
    parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    parting.start()
    parting.join(_PARTING_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def check_same(what: str, value: Any) -> None:
    """Checks that all processes have the same value; they wait for each other.

    Args:
      what: how the message begins.
      value: compared by its `repr`.

    Raises:
      ConfigError: processes have other values than process 0; all of them raise it.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = hashlib.sha256(repr(value).encode()).digest()
    mine = np.frombuffer(digest, np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    others = np.flatnonzero((everyone != everyone[0]).any(axis=1))
    if others.size:
        raise ConfigError(
            f"{what}; process {others[0]} has something else than process 0"
        )
