"""The command: `python -m jaxkd.main --config=FILE[:variant] --workdir=DIR`.

Exit status: 0 finished; 1 training failed; 2 a mistake in the arguments or the
config; 75 stopped by SIGTERM or SIGINT after saving (run again to continue).
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

FINISHED, FAILED, MISTAKE, STOPPED = 0, 1, 2, 75


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
        choices=("train", "eval", "report"),
        default="train",
        help="train (and resume), evaluate again, or write the report page again",
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
    from jaxkd.training.config import apply_overrides, load_config, parse_overrides
    from jaxkd.training.schema import ConfigError

    try:
        config = apply_overrides(load_config(known.config), parse_overrides(rest))
        return _run(known.mode, config, known.workdir, _command(arguments))
    except ConfigError as error:
        return _mistake(str(error))


def _write_page(path: Path) -> None:
    from jaxkd.report import ReportError, write_report
    from jaxkd.training.schema import ConfigError

    try:
        print(f"report: {write_report([path], path / 'report.html')}")
    except ReportError as error:
        raise ConfigError(f"--workdir: {error}") from error


def _run(mode: str, config: dict[str, Any], path: Path, command: str) -> int:
    from jaxkd.data import DamagedFileError
    from jaxkd.report import results_table
    from jaxkd.training import loop
    from jaxkd.training.checkpoints import CheckpointError
    from jaxkd.training.plan import Plan
    from jaxkd.training.schema import ConfigError, one_line
    from jaxkd.training.setup import make_setup
    from jaxkd.training.workdir import Workdir

    plan = Plan.from_config(config)
    workdir = Workdir(path)
    summary = workdir.summary()
    if mode != "train" and not summary:
        raise ConfigError(
            f"--workdir: {path} holds no finished stage; run with --mode=train first"
        )
    complete = summary.get("status") == "finished"
    try:
        if mode == "eval":
            workdir.check(plan, free=("evaluation",))
            summary = loop.evaluate(make_setup(plan), workdir)
        elif mode == "report" or complete:
            workdir.check(plan)
        else:
            with loop.StopSignal() as stop:
                setup = make_setup(plan)
                workdir.claim(plan)
                summary = loop.run(setup, workdir, command=command, stop=stop)
    except loop.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    except (loop.TrainingFailed, DamagedFileError, CheckpointError, OSError) as failure:
        print(f"error: {one_line(failure)}", file=sys.stderr)
        return FAILED
    if workdir.writes:
        if mode == "train" and complete:
            print(f"{path}: the run is complete")
        print(results_table(summary))
        _write_page(path)
    return FINISHED


def _command(arguments: Sequence[str]) -> str:
    return f"python -m jaxkd.main {shlex.join(arguments)}"


def _mistake(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
