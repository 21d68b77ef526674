"""What a distillation step sends between devices, and what a second process costs.

    python bench/scaling.py

prints one JSON line. Everything is simulated on the cores of one host. `traffic` counts
the collectives of the compiled step on 1, 2, 4 and 8 simulated devices: what real ones
would send, apart from what their compilers do better (those of GPUs and TPUs make
reduce-scatters of the sums that fsdp needs in parts). `seconds_per_step` are those on
two simulated devices, in one process and in two that exchange through gloo and take
turns with the first; `ratio` is two over one. It says nothing about real networks.

The step is that of `python -m jaxkd.main`: a student of configs/kd.py learns from its
frozen teacher on random images in the shape of CIFAR, in float32. Bytes are per step;
`sent_bytes` are those that each device sends, if the devices form a ring.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import synthetic
from measuring import Mistake

DEVICES = (1, 2, 4, 8)
# By name: what `config.mesh` says.
MESHES = {
    "data": {},
    "fsdp": {"fsdp": -1},
    "fsdp, split teacher": {"fsdp": -1, "teacher": "sharded"},
}
PAIR = "resnet32x4-resnet8x4"
PROCESSES = (1, 2)
_QUICK = "--xla_backend_optimization_level=0"


class Options(NamedTuple):
    """What is measured."""

    pair: str
    batch_size: int
    devices: tuple[int, ...]
    steps: int
    rounds: int


def parse(arguments: Sequence[str] | None) -> Options:
    """Reads and checks the command line."""
    parser = measuring.Parser("scaling.py", __doc__)
    parser.add_argument("--pair", default=PAIR, help="TEACHER-STUDENT")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--devices", type=int, nargs="+", default=DEVICES, help="how many are simulated"
    )
    parser.add_argument("--steps", type=int, default=3, help="per round")
    parser.add_argument(
        "--rounds", type=int, default=5, help="of the timing; 0 counts traffic only"
    )
    values = vars(parser.parse_args(arguments))
    options = Options(**{**values, "devices": tuple(values["devices"])})
    measuring.at_least(options, 1, "batch_size", "steps")
    measuring.at_least(options, 0, "rounds")
    for count in (*options.devices, 2):
        if count < 1 or options.batch_size % count:
            raise Mistake(
                f"--batch-size {options.batch_size} does not split over {count} devices"
            )
    return options


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def training(
    pair: str, batch_size: int, data: Path, mesh: dict[str, Any], devices: int
) -> Any:
    """The stage, on the first devices.

    Args:
      pair: TEACHER-STUDENT.
      batch_size: over all devices.
      data: the images.
      mesh: of `config.mesh`; -1 stands for all the devices.
      devices: how many.
    """
    import jax
    import programs

    from jaxkd.training import sharding

    config = programs.configured(
        f"kd.py:{pair}",
        {
            **synthetic.teaching(data),
            "data.batch_size": batch_size,
            "train.resident": False,
            "log.every_steps": 1,
        },
    )
    setup = programs.set_up(config)
    sizes = {k: devices if v == -1 else v for k, v in mesh.items() if k != "teacher"}
    plan = dataclasses.replace(setup.plan.mesh, teacher=mesh.get("teacher", "auto"))
    setup = dataclasses.replace(
        setup,
        plan=dataclasses.replace(setup.plan, mesh=plan),
        mesh=sharding.make_mesh(**sizes, devices=jax.devices()[:devices]),
    )
    return programs.Training(setup, setup.stages[0], repeat=True)


def count_traffic(options: Options, data: Path) -> list[dict[str, Any]]:
    """Compiles the step for every mesh and number of devices."""
    import jax

    from jaxkd.analysis import read_collectives, sum_up

    found = []
    for devices in options.devices:
        for name, mesh in MESHES.items():
            if devices == 1 and mesh:
                continue
            stage = training(options.pair, options.batch_size, data, mesh, devices)
            kinds = sum_up(read_collectives(stage.compile()))
            traffic = {kind: dataclasses.asdict(sums) for kind, sums in kinds.items()}
            found.append(
                {
                    "devices": devices,
                    "mesh": name,
                    "bytes": sum(sums["bytes"] for sums in traffic.values()),
                    "sent_bytes": sum(sums["sent_bytes"] for sums in traffic.values()),
                    "bytes_per_device": stage.bytes_per_device,
                    "collectives": traffic,
                }
            )
            stage.close()
            jax.clear_caches()
            print(
                f"{devices} devices, {name}: {found[-1]['bytes'] / 1e6:.2f} MB in "
                "collectives (simulated)",
                file=sys.stderr,
            )
    return found


# -------------------------------------------------------------------------- processes


class Group:
    """Processes that run the step together, one round at a time.

    Args:
      options: what is measured.
      data: the images.
      count: how many there are; together they have two devices.
    """

    def __init__(self, options: Options, data: Path, count: int):
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        paths = [str(Path(__file__).parent), *sys.path]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(2 // count),
        }
        code = "import sys, scaling; scaling.work(*sys.argv[1:])"
        arguments = (options.pair, str(options.batch_size), str(data))
        self._processes = []
        for i in range(count):
            where = f"localhost:{port},{count},{i}" if count > 1 else "off"
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, *arguments, where],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def round(self, steps: int) -> float:
        """Runs steps and returns the seconds of the slowest process."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        return max(map(_answer, self._processes))

    def close(self) -> None:
        """Lets the processes end, which wait for each other."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait(timeout=120)

    def kill(self) -> None:
        """Ends processes that have not ended by themselves."""
        for process in self._processes:
            process.kill()
            with process:
                process.wait()


def _answer(process: subprocess.Popen[str]) -> float:
    """What a process measured."""
    assert process.stdout is not None
    for line in process.stdout:
        # Gloo tells of its connections in between.
        if line.startswith("seconds "):
            return float(line.split()[1])
    raise Mistake("a process ended early; see what it said above")


def work(pair: str, batch_size: str, data: str, where: str) -> None:
    """One process of a group: runs as many steps as each line of its input says."""
    from jaxkd.training import distributed

    processes = distributed.parse_processes(where, {})
    if processes is not None:
        distributed.connect(processes)
    stage = training(pair, int(batch_size), Path(data), MESHES["data"], 2)
    for line in sys.stdin:
        start = time.perf_counter()
        stage.run(int(line))
        print(f"seconds {time.perf_counter() - start}", flush=True)
    stage.close()


def time_processes(options: Options, data: Path) -> dict[str, list[float]]:
    """Seconds per step in one process and in two, in turns."""
    groups: dict[str, Group] = {}
    try:
        for count in PROCESSES:
            groups[str(count)] = Group(options, data, count)
        for group in groups.values():
            group.round(1)
        seconds: dict[str, list[float]] = {name: [] for name in groups}
        for number in range(options.rounds):
            for name, group in groups.items():
                # An untimed step wakes this side's threads.
                group.round(1)
                seconds[name].append(group.round(options.steps) / options.steps)
            shown = ", ".join(f"{k}: {v[-1]:.3f}" for k, v in seconds.items())
            print(
                f"round {number + 1} of {options.rounds}, seconds per step by number "
                f"of processes (simulated): {shown}",
                file=sys.stderr,
            )
        for group in groups.values():
            group.close()
    finally:
        for group in groups.values():
            group.kill()
    return seconds


def simulate(options: Options) -> dict[str, Any]:
    """Counts the traffic, times the processes."""
    with tempfile.TemporaryDirectory() as folder:
        data = synthetic.write_cifar(
            Path(folder) / "images.npz",
            train=2 * options.batch_size,
            test=options.batch_size,
        )
        # Traffic is read off programs that never run: they are compiled quickly.
        flags = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}"
        count = str(max(options.devices))
        with environment(XLA_FLAGS=flags, JAX_NUM_CPU_DEVICES=count):
            measuring.use_device("cpu")
            traffic = count_traffic(options, data)
        seconds = time_processes(options, data) if options.rounds else {}
    return {
        "benchmark": "scaling",
        "simulated": True,
        **_compared(seconds),
        "traffic": traffic,
        "pair": options.pair,
        "batch_size": options.batch_size,
        "dtype": "float32",
        "steps": options.steps,
        "rounds": options.rounds,
    }


def _compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds per step, and how much longer a step takes in two processes."""
    if not seconds:
        return {"ratio": None, "seconds_per_step": None}
    return {
        "ratio": measuring.ratio_of(seconds["2"], seconds["1"]),
        "seconds_per_step": {
            name: measuring.spread(values, 4) for name, values in seconds.items()
        },
    }


def measure(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Measures what the command line asks for."""
    # JAX starts with the devices that the work asks for.
    return measuring.report(parse(arguments), simulate, elsewhere=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints one JSON line, returns the exit status."""
    return measuring.end(measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
