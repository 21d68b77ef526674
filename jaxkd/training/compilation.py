"""Compiling ahead of time: what a program costs is known before its first step.

`compile_ahead` traces, counts and compiles; `use_compilation_cache` keeps compiled
programs between runs.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import platformdirs

from jaxkd.analysis.costs import count_jaxpr

# Programs that compile in less are not worth a file.
_WORTH_KEEPING_SECONDS = 0.5
_CACHE_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """What a compiled program costs.

    Attributes:
      compile_seconds: wall time of tracing and compiling; less from the cache.
      flops: of one run, two per multiply-accumulate of the products and convolutions
        that the program asks for, over all devices; None if they cannot be counted.
      argument_bytes: of what is given to the program, per device.
      output_bytes: of what it returns and what does not replace an argument.
      temporary_bytes: of everything in between.
    """

    compile_seconds: float
    flops: int | None
    argument_bytes: int | None
    output_bytes: int | None
    temporary_bytes: int | None

    @property
    def peak_bytes(self) -> int | None:
        """Bytes per device that the program needs, None if the compiler hides them."""
        parts = (self.argument_bytes, self.output_bytes, self.temporary_bytes)
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


def compile_ahead(
    function: Callable[..., Any], *args: Any, **jit_options: Any
) -> tuple[Callable[..., Any], ProgramReport]:
    """Compiles a function for arguments like the given ones, which are not used up.

    Args:
      function: a pure function.
      *args: arrays, or `jax.ShapeDtypeStruct`s with shardings.
      **jit_options: of `jax.jit`.

    Returns:
      The compiled function, to be called with arguments of the same shapes, dtypes and
      shardings; and its report.
    """
    start = time.monotonic()
    traced = jax.jit(function, **jit_options).trace(*args)
    try:
        flops = 2 * count_jaxpr(traced.jaxpr).macs
    except ValueError:
        # A while loop around products, in a network or a loss of the user's.
        flops = None
    compiled = traced.lower().compile(compiler_options=_keep_barriers())
    seconds = time.monotonic() - start
    memory: Any = compiled.memory_analysis()
    arguments = outputs = temporaries = None
    if memory is not None:
        arguments = memory.argument_size_in_bytes
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        temporaries = memory.temp_size_in_bytes
    return compiled, ProgramReport(
        compile_seconds=seconds,
        flops=flops,
        argument_bytes=arguments,
        output_bytes=outputs,
        temporary_bytes=temporaries,
    )


def _keep_barriers() -> dict[str, str | bool] | None:
    """Compiler options under which rematerialisation saves memory.

    `jax.checkpoint` puts a barrier between the backward pass and what it recomputes. On
    the CPU, XLA takes barriers away before it schedules the program, and then computes
    everything at the beginning again.
    """
    if jax.default_backend() == "cpu":
        return {"xla_disable_hlo_passes": "cse_barrier_expander"}
    return None


def run_once() -> dict[str, int] | None:
    """Compiler options for a program that runs once.

    On the CPU, optimising the initialisation of a large network takes longer than
    everything it would save.
    """
    if jax.default_backend() == "cpu":
        return {"xla_backend_optimization_level": 0}
    return None


def use_compilation_cache() -> Path | None:
    """Keeps compiled programs in the user's cache folder, up to 4 GiB.

    A folder that is chosen already, by `jax.config` or by `JAX_COMPILATION_CACHE_DIR`,
    stays; `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off. A folder that
    cannot be written is not used.

    Returns:
      The folder, None if there is no cache.
    """
    # Attributes that JAX adds when it is imported.
    if not getattr(jax.config, "jax_enable_compilation_cache"):  # noqa: B009
        return None
    chosen = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009
    if chosen:
        return Path(chosen)
    folder = Path(platformdirs.user_cache_dir("jaxkd", appauthor=False), "xla")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING_SECONDS
    )
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    return folder
