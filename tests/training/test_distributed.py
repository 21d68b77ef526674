"""Where processes meet, and how they part; tests/test_launch.py runs real ones."""

import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxkd.training import ConfigError, distributed
from jaxkd.training.distributed import Processes, parse_processes

VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


@pytest.mark.parametrize(
    ("flag", "environ", "found"),
    [
        (None, {}, None),
        ("off", VARIABLES, None),
        ("auto", {}, Processes()),
        (None, VARIABLES, Processes(address="host:1234", count=4, index=3)),
        ("[::1]:80,2,0", VARIABLES, Processes(address="[::1]:80", count=2, index=0)),
    ],
)
def test_the_flag_counts_before_the_environment(flag, environ, found):
    assert parse_processes(flag, environ) == found


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("on", "--distributed: must be off, auto or HOST:PORT,COUNT,INDEX, got on"),
        ("host:1,2", "must be off, auto or HOST:PORT,COUNT,INDEX"),
        ("host,2,0", "--distributed: 'host' is no HOST:PORT"),
        ("host:99999,2,0", "'host:99999' is no HOST:PORT"),
        (":80,2,0", "':80' is no HOST:PORT"),
        ("host:80,two,0", "invalid literal"),
        ("host:80,0,0", "the number of processes must be >= 1, got 0"),
        ("host:80,2,2", "process 2 of 2; they are counted from 0"),
        ("host:80,2,-1", "process -1 of 2"),
    ],
)
def test_a_flag_that_cannot_be_read_is_refused(flag, message):
    with pytest.raises(ConfigError, match=message):
        parse_processes(flag, {})


@pytest.mark.parametrize("missing", VARIABLES)
def test_half_an_environment_is_refused(missing):
    environ = {**VARIABLES, missing: ""}
    with pytest.raises(
        ConfigError, match=f"{missing} is not set, but others?"
    ) as error:
        parse_processes(None, environ)
    assert "--distributed=off" in str(error.value)


def test_a_mistake_in_the_environment_is_named():
    with pytest.raises(ConfigError, match="environment: process 4 of 4"):
        parse_processes(None, {**VARIABLES, "JAX_PROCESS_ID": "4"})


@pytest.fixture
def initialize(monkeypatch):
    """Takes the place of `jax.distributed.initialize`."""
    calls = []

    def make(error=None):
        def initialize(*args, **kwargs):
            calls.append((args, kwargs))
            if error is not None:
                raise error

        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        return calls

    return make


def test_what_is_known_is_not_looked_for(initialize):
    calls = initialize()
    distributed.connect(Processes(address="host:80", count=2, index=1))
    distributed.connect(Processes())
    (known, options), (unknown, others) = calls
    assert known == ("host:80", 2, 1)
    assert options["cluster_detection_method"] == "deactivate"
    assert unknown == (None, None, None)
    assert others["cluster_detection_method"] is None


def test_processes_that_do_not_meet_end_in_one_line(initialize):
    initialize(RuntimeError("DEADLINE_EXCEEDED:\n  Barrier timed out"))
    with pytest.raises(distributed.DistributedError) as error:
        distributed.connect(Processes(address="host:80", count=2, index=1))
    text = str(error.value)
    assert "did not meet at host:80 within 300 s (DEADLINE_EXCEEDED: Barrier" in text
    assert "\n" not in text


def test_no_cluster_for_auto_ends_in_one_line(initialize):
    initialize(ValueError("coordinator_address should be defined."))
    with pytest.raises(ConfigError, match="auto: no SLURM.* give HOST:PORT,COUNT"):
        distributed.connect(Processes())


LEAVE = """
import threading, time
import jax
from jaxkd.training import distributed

# A barrier that the others never reach.
jax.distributed.shutdown = threading.Event().wait
distributed._PARTING_SECONDS = 0.1
print("said before", end="")
distributed.leave(7)
"""


def test_a_process_that_fails_does_not_wait_for_the_others():
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", LEAVE], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout == "said before" and time.monotonic() - begin < 100


@pytest.fixture
def processes(monkeypatch):
    """Lets `check_same` believe in three processes with the given values."""

    def make(others):
        monkeypatch.setattr(jax, "process_count", lambda: 1 + len(others))

        def process_allgather(mine):
            rows = [mine]
            for value in others:
                with monkeypatch.context() as patch:
                    patch.setattr(
                        multihost_utils,
                        "process_allgather",
                        lambda own: rows.append(own) or np.stack([own]),
                    )
                    distributed.check_same("other", value)
            return np.stack(rows)

        monkeypatch.setattr(multihost_utils, "process_allgather", process_allgather)

    return make


def test_equal_values_pass(processes):
    processes([(1, "a"), (1, "a")])
    distributed.check_same("numbers", (1, "a"))


def test_the_first_process_that_differs_is_named(processes):
    processes([(1, "a"), (2, "a")])
    with pytest.raises(ConfigError, match="numbers; process 2 has something else than"):
        distributed.check_same("numbers", (1, "a"))


def test_one_process_agrees_with_itself():
    distributed.check_same("anything", object())
