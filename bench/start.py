"""How long it takes to start: the import, and a run until its first training step.

    python bench/start.py

prints one JSON line. Every start is a fresh process of this Python. `python`, `jax` and
`jaxkd` are the interpreter alone, `import jax` and `import jaxkd`. `cold` and `warm`
are `python -m jaxkd.main` on the smoke variant of a config until the first step is
logged: cold with an empty home and cache folder, warm the same run again, in another
workdir, with the programs that the cold one compiled. `ratio` is cold over warm. Files
of Python and of its packages lie in the system's page cache, as on any second start.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measuring
from measuring import Mistake

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = {"python": "pass", "jax": "import jax", "jaxkd": "import jaxkd"}
_POLL_SECONDS = 0.01


class Options(NamedTuple):
    """What is measured."""

    config: str
    stage: str
    device: str
    rounds: int
    timeout: float


def parse(arguments: Sequence[str] | None) -> Options:
    """Reads and checks the command line."""
    parser = measuring.Parser("start.py", __doc__)
    parser.add_argument("--config", default="configs/kd.py:smoke")
    parser.add_argument("--stage", default="teacher", help="the stage that is run")
    parser.add_argument("--device", choices=measuring.DEVICES, default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=300.0, help="of one start")
    options = Options(**vars(parser.parse_args(arguments)))
    measuring.at_least(options, 1, "rounds", "timeout")
    return options


def environment(home: Path, device: str) -> dict[str, str]:
    """The environment of a user who has nothing yet."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("JAX_", "XDG_"))
    }
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **kept,
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda,cpu"}[device],
        "PYTHONPATH": os.pathsep.join(path),
    }


def import_seconds(code: str, variables: Mapping[str, str]) -> float:
    """Wall time of a process that runs this code."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=dict(variables), check=True)
    return time.perf_counter() - start


def first_step_seconds(
    command: Sequence[str],
    workdir: Path,
    variables: Mapping[str, str],
    *,
    timeout: float,
) -> float:
    """Seconds from the start of a run until its first training record is written.

    The run is ended then.

    Raises:
      Mistake: the run found a mistake, or ended or took too long before its first step.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, env=dict(variables), stdout=said, stderr=said, text=True
        )
        try:
            while True:
                seconds = time.perf_counter() - start
                if has_trained(workdir / "metrics.jsonl"):
                    return seconds
                status = process.poll()
                if status is not None or seconds > timeout:
                    said.seek(0)
                    why = "took too long" if status is None else f"ended with {status}"
                    last = said.read().strip().splitlines()[-1:]
                    raise Mistake(
                        f"the run {why} before its first step: {' '.join(last)}"
                    )
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()


def has_trained(metrics: Path) -> bool:
    """Whether a run has logged a training step."""
    return metrics.exists() and b'"kind": "train"' in metrics.read_bytes()


def starts(
    options: Options, folder: Path, start: Callable[..., float] = first_step_seconds
) -> dict[str, list[float]]:
    """Seconds to the first step of every round, cold and warm."""
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for number in range(options.rounds):
        home = folder / f"home{number}"
        home.mkdir()
        variables = environment(home, options.device)
        for kind in seconds:
            workdir = folder / f"{kind}{number}"
            command = [
                *(sys.executable, "-m", "jaxkd.main"),
                f"--config={ROOT / options.config}",
                f"--workdir={workdir}",
                f"--config.run={(options.stage,)}",
                "--config.log.every_steps=1",
            ]
            taken = start(command, workdir, variables, timeout=options.timeout)
            seconds[kind].append(taken)
        shown = ", ".join(f"{k} {v[-1]:.1f} s" for k, v in seconds.items())
        print(f"round {number + 1} of {options.rounds}: {shown}", file=sys.stderr)
    return seconds


def imports(options: Options, folder: Path) -> dict[str, list[float]]:
    """Seconds of the processes of `IMPORTS` in every round, in turns."""
    variables = environment(folder, options.device)
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for code in IMPORTS.values():
        import_seconds(code, variables)
    for _ in range(options.rounds):
        for name, code in IMPORTS.items():
            seconds[name].append(import_seconds(code, variables))
    return seconds


def summarise(
    imported: Mapping[str, Sequence[float]], started: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """What is told of the seconds of all rounds."""
    bare = statistics.median(imported["python"])
    return {
        "benchmark": "start",
        "ratio": measuring.ratio_of(started["cold"], started["warm"]),
        "import_jaxkd_seconds": round(statistics.median(imported["jaxkd"]) - bare, 3),
        "import_jax_seconds": round(statistics.median(imported["jax"]) - bare, 3),
        "process_seconds": {k: measuring.spread(v, 3) for k, v in imported.items()},
        "first_step_seconds": {k: measuring.spread(v, 3) for k, v in started.items()},
    }


def work(options: Options) -> dict[str, Any]:
    """Starts processes, which need the device."""
    with tempfile.TemporaryDirectory() as folder:
        imported = imports(options, Path(folder))
        started = starts(options, Path(folder))
    return {
        **summarise(imported, started),
        "config": options.config,
        "stage": options.stage,
        "rounds": options.rounds,
    }


def measure(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Measures what the command line asks for."""
    return measuring.report(parse(arguments), work, elsewhere=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints one JSON line, returns the exit status."""
    return measuring.end(measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
