"""Compiling ahead of time, and the cache between runs."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from packaging.requirements import Requirement

from jaxkd.training.compilation import ProgramReport, compile_ahead


def test_the_compiled_function_computes_and_its_report_counts():
    x = jnp.ones((4, 8))
    compiled, report = compile_ahead(lambda x, y: jnp.tanh(x @ y), x, x.T)
    assert compiled(x, x.T)[0, 0] == pytest.approx(1.0)
    assert report.flops == 2 * 4 * 8 * 4
    assert report.argument_bytes == 2 * 4 * 4 * 8
    assert report.output_bytes == 4 * 4 * 4
    assert report.compile_seconds > 0


def test_a_loop_is_counted_as_often_as_it_runs():
    def loop(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]

    assert compile_ahead(loop, jnp.eye(3))[1].flops == 5 * 2 * 27


def test_what_cannot_be_counted_is_none():
    def until_large(x):
        return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c + 1, x)

    assert compile_ahead(until_large, jnp.eye(3))[1].flops is None


def test_an_argument_that_is_donated_needs_no_room_for_its_result():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    _, kept = compile_ahead(lambda x: x + 1, x)
    _, donated = compile_ahead(lambda x: x + 1, x, donate_argnums=0)
    assert kept.output_bytes == 4 * 256 * 256 and donated.output_bytes == 0
    assert donated.peak_bytes < kept.peak_bytes


def test_a_peak_is_not_made_up():
    report = ProgramReport(
        compile_seconds=1.0,
        flops=None,
        argument_bytes=4,
        output_bytes=None,
        temporary_bytes=8,
    )
    assert report.peak_bytes is None


CACHE = """
import jax
from jaxkd.training.compilation import use_compilation_cache
print(use_compilation_cache())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 2 + 1)(1.0)
"""


def cache_of(tmp_path, **environment):
    """What a fresh process says, with a home folder of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", CACHE],
        env={**clean, "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_programs_are_kept_in_the_users_cache_folder(tmp_path):
    folder = cache_of(tmp_path)
    assert folder.startswith(str(tmp_path)) and folder.endswith(
        os.path.join("jaxkd", "xla")
    )
    assert os.listdir(folder)


def test_the_users_own_choice_of_a_cache_stays(tmp_path):
    own = str(tmp_path / "own")
    assert cache_of(tmp_path, JAX_COMPILATION_CACHE_DIR=own) == own
    assert os.listdir(own)
    assert cache_of(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == "None"


def plain_install():
    """What `pip install` of this pyproject.toml brings: the names of distributions."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    wanted = [*tomllib.loads(project.read_text())["project"]["dependencies"]]
    found = set()
    while wanted:
        requirement = Requirement(wanted.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        extras = requirement.extras or {""}
        marker = requirement.marker
        needed = marker is None or marker.evaluate({"extra": ""})
        if not needed or name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            inner = Requirement(line)
            if inner.marker is None or any(
                inner.marker.evaluate({"extra": extra}) for extra in extras
            ):
                inner.marker = None
                wanted.append(str(inner))
    return found


# Hides what a plain installation would not bring.
HIDE = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError("No module named " + name, name=name)

sys.meta_path.insert(0, Hide())
import warnings
warnings.simplefilter("error")
"""


def cache_without(hidden, tmp_path):
    """Whether a fresh process without some packages fills its cache, and its words."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=set(hidden)) + CACHE],
        env={**clean, "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    folder = done.stdout.strip()
    return bool(folder) and bool(os.listdir(folder)), done.stderr


def test_the_cache_needs_nothing_but_what_a_plain_installation_brings(tmp_path):
    brought = plain_install()
    assert {"jax", "jaxlib", "numpy", "filelock"} <= brought
    assert not brought & {"pytest", "tensorflow-datasets", "nibabel"}
    owners = importlib.metadata.packages_distributions()
    hidden = {
        package
        for package, names in owners.items()
        if package != "jaxkd"
        and not brought.intersection(re.sub(r"[-_.]+", "-", n).lower() for n in names)
    }
    assert "pytest" in hidden and "filelock" not in hidden
    filled, words = cache_without(hidden, tmp_path)
    assert filled, words


def test_without_filelock_there_would_be_no_cache(tmp_path):
    filled, words = cache_without({"filelock"}, tmp_path)
    assert not filled and "filelock" in words
