"""The command: `python -m jaxkd.main --config=FILE[:variant] --workdir=DIR`.

Exit status: 0 finished; 1 training failed; 2 a mistake in the arguments or the
config; 75 stopped by SIGTERM or SIGINT after saving (run again to continue).

Several processes run the same command, connected by `--distributed`; the first one
alone writes files and tells what it does.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jaxkd.training.plan import Plan
    from jaxkd.training.workdir import Workdir

FINISHED, FAILED, MISTAKE, STOPPED = 0, 1, 2, 75
# How XLA begins to say that a device has no memory left.
_NO_MEMORY = "RESOURCE_EXHAUSTED"


class _Parser(argparse.ArgumentParser):
    """Reports a mistake by an exception instead of usage lines and an exit."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def make_parser() -> argparse.ArgumentParser:
    """The parser of everything but `--config.key=value`."""
    parser = _Parser(
        prog="python -m jaxkd.main",
        description="Trains, evaluates and reports what a config describes.",
        epilog=(
            "One value of the config is changed by --config.key=value, e.g. "
            "--config.data.batch_size=32. Running the same command again resumes. "
            "Exit status: 0 finished, 1 training failed, 2 mistake in the arguments "
            "or the config, 75 stopped after saving."
        ),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:VARIANT]",
        help="Python file with get_config(arg), e.g. configs/hlfd.py:smoke",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        type=Path,
        help="folder of the run: config, metrics, checkpoints, summary, report",
    )
    parser.add_argument(
        "--mode",
        choices=("train", "label", "eval", "report"),
        default="train",
        help="train (and resume), write the teachers' answers for the stages that have "
        "targets, evaluate again, or write the report page again",
    )
    parser.add_argument(
        "--distributed",
        metavar="WHERE",
        help="connect several processes that run this command: auto (SLURM, Open MPI, "
        "Cloud TPU, Kubernetes), HOST:PORT,COUNT,INDEX (of process 0; how many; which "
        "this is), or off; by default JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID tell, if they are set",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    try:
        known, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        return _mistake(f"{error}; see --help")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("jaxkd").setLevel(logging.INFO)

    # Imported here so that --help and mistakes in the arguments answer at once.
    from jaxkd.training import distributed
    from jaxkd.training.config import apply_overrides, load_config, parse_overrides
    from jaxkd.training.schema import ConfigError

    def run() -> int:
        try:
            config = apply_overrides(load_config(known.config), parse_overrides(rest))
            return _run(known.mode, config, known.workdir, _command(arguments))
        except ConfigError as error:
            return _mistake(str(error))

    try:
        processes = distributed.parse_processes(known.distributed, os.environ)
        if processes is None:
            return run()
        distributed.connect(processes)
    except ConfigError as error:
        return _mistake(str(error))
    except distributed.DistributedError as error:
        return _failure(str(error))
    return _run_with_others(run)


def _run_with_others(run: Callable[[], int]) -> int:
    """Runs one of several processes; it does not wait for the others if it fails."""
    import jax

    from jaxkd.training import distributed

    if jax.process_index():
        logging.getLogger("jaxkd").setLevel(logging.WARNING)
    try:
        status = run()
    except jax.errors.JaxRuntimeError as error:
        text = str(error).partition("\n")[0]
        if _NO_MEMORY not in text:
            text += " (another process may have ended; see what it says)"
        status = _failure(text)
    except BaseException:
        traceback.print_exc()
        status = FAILED
    if status in (FAILED, MISTAKE):
        distributed.leave(status)
    return status


def _write_page(path: Path) -> None:
    from jaxkd.report import ReportError, write_report
    from jaxkd.training.schema import ConfigError

    try:
        print(f"report: {write_report([path], path / 'report.html')}")
    except ReportError as error:
        raise ConfigError(f"--workdir: {error}") from error


def _run(mode: str, config: dict[str, Any], path: Path, command: str) -> int:
    import jax

    from jaxkd.data import DamagedFileError
    from jaxkd.report import results_table
    from jaxkd.training import loop
    from jaxkd.training.checkpoints import CheckpointError
    from jaxkd.training.compilation import use_compilation_cache
    from jaxkd.training.distributed import check_same
    from jaxkd.training.labelling import TargetsDiffer, label
    from jaxkd.training.plan import Plan
    from jaxkd.training.progress import TrainingFailed
    from jaxkd.training.schema import ConfigError, one_line
    from jaxkd.training.setup import make_setup
    from jaxkd.training.signals import Stopped, StopSignal
    from jaxkd.training.target_files import check_targets
    from jaxkd.training.workdir import Workdir

    plan = Plan.from_config(config)
    use_compilation_cache()
    workdir = Workdir(path)
    check_same("config: every process must run the same command", plan)
    shared = f"--workdir: {path} must be on a file system that all processes share"
    check_same(shared, workdir.progress())
    summary = workdir.summary()
    if mode in ("eval", "report") and not summary:
        raise ConfigError(
            f"--workdir: {path} holds no finished stage; run with --mode=train first"
        )
    complete = summary.get("status") == "finished"
    try:
        if mode == "label":
            with StopSignal() as stop:
                setup = make_setup(plan)
                workdir.claim(plan)
                for line in label(setup, workdir, command=command, stop=stop):
                    print(line)
            return FINISHED
        if mode == "eval":
            workdir.check(plan, free=("evaluation",))
            summary = loop.evaluate(make_setup(plan), workdir)
        elif mode == "report" or complete:
            workdir.check(plan)
        else:
            with StopSignal() as stop:
                setup = make_setup(plan)
                check_same(
                    "config.data: every process must find the same records",
                    (len(setup.train), len(setup.test)),
                )
                check_targets(setup, workdir)
                workdir.claim(plan)
                check_same(shared, workdir.claimed(plan))
                summary = loop.run(setup, workdir, command=command, stop=stop)
    except Stopped as stopped:
        if workdir.writes:
            print(stopped, file=sys.stderr)
        return STOPPED
    except (
        TrainingFailed,
        TargetsDiffer,
        DamagedFileError,
        CheckpointError,
        OSError,
    ) as failure:
        return _failure(one_line(failure))
    except jax.errors.JaxRuntimeError as error:
        if _NO_MEMORY not in str(error):
            raise
        return _failure(_out_of_memory(error, mode, plan, workdir))
    if workdir.writes:
        if mode == "train" and complete:
            print(f"{path}: the run is complete")
        print(results_table(summary))
        try:
            _write_page(path)
        except OSError as error:
            return _failure(f"cannot write the report page: {one_line(error)}")
    return FINISHED


def _out_of_memory(error: Exception, mode: str, plan: Plan, workdir: Workdir) -> str:
    """What was being done when the memory of a device was used up, and what helps."""
    reason = str(error).partition("\n")[0].strip()[:200]
    if mode == "eval":
        return (
            f"out of memory while evaluating ({reason}); make "
            "config.evaluation.batch_size smaller (without it, it is "
            "config.data.batch_size)"
        )
    finished = {stage["name"] for stage in workdir.summary().get("stages", ())}
    name = next((name for name in plan.stages if name not in finished), None)
    if mode == "label" or name is None:
        return (
            f"out of memory while the teachers' answers were computed ({reason}); "
            'make config.data.batch_size smaller or set config.precision="bfloat16"'
        )
    return (
        f"out of memory in stage {name!r} ({reason}); set "
        'config.train.remat="blocks", with which a run that has begun goes on, or, '
        "with another --workdir, make config.data.batch_size smaller or "
        f"config.stages.{name}.accumulate larger, or set "
        'config.precision="bfloat16"'
    )


def _command(arguments: Sequence[str]) -> str:
    return f"python -m jaxkd.main {shlex.join(arguments)}"


def _mistake(text: str) -> int:
    _tell(text)
    return MISTAKE


def _failure(text: str) -> int:
    _tell(text)
    return FAILED


def _tell(text: str) -> None:
    """Tells of an error, and in a run of several processes which one met it."""
    jax, who = sys.modules.get("jax"), ""
    if jax is not None and jax.distributed.is_initialized():
        who = f"process {jax.process_index()} of {jax.process_count()}: "
    print(f"{who}error: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
