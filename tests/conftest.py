"""Strict defaults for every test: see docs/development.md."""

import gc
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

import jax
import pytest

# Most of the time of the tests is LLVM's. What it compiles here runs once on tiny
# arrays, so it need not be fast; the options are those of the pinned JAX.
_FLAGS = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

# Before anything touches a backend: eight simulated CPU devices.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The processes of one test run share what they compile; nothing outlives the run.
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"process-{os.getpid()}")
_CACHE = Path(tempfile.gettempdir()) / f"jaxkd-tests-{_RUN}"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

import jaxtyping  # noqa: E402
from beartype import BeartypeConf, beartype  # noqa: E402

# Annotations are checked at run time in tests; users pay nothing. The import hook takes
# the checker by name. As for static checkers, an int is a float.
_checker = types.ModuleType("jaxkd_test_typechecker")
_checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules[_checker.__name__] = _checker
jaxtyping.install_import_hook("jaxkd", f"{_checker.__name__}.check")


# A process that has grown beyond this forgets its compiled programs. After every file
# would cost more time than it is worth: files share many small programs.
_MUCH_MEMORY = 2 * 2**30


def _memory():
    """The bytes of this process that lie in memory; infinite where unknown."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return float("inf")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pytest_collection_finish():
    """What is imported stays: the garbage collector need not look at it each time."""
    gc.collect()
    gc.freeze()
    # Tracing makes many small objects, few of them in cycles.
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Compiled programs do not pile up from file to file."""
    yield
    if _memory() > _MUCH_MEMORY:
        jax.clear_caches()
        gc.collect()


def pytest_sessionfinish(session):
    """Removes the compiled programs when the last process of the run ends."""
    is_worker = hasattr(session.config, "workerinput")
    if not is_worker:
        run = getattr(session.config, "_jaxkd_run", _RUN)
        shutil.rmtree(
            Path(tempfile.gettempdir()) / f"jaxkd-tests-{run}", ignore_errors=True
        )


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Remembers the run's name in the process that starts the workers (xdist)."""
    node.config._jaxkd_run = node.workerinput["testrunuid"]
