"""Importing jaxkd is quick, needs no TensorFlow, and finds every promised name."""

import ast
import doctest
import importlib
import importlib.metadata
import itertools
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxkd

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(jaxkd.__path__, "jaxkd.")
    if not module.name.startswith("jaxkd.data.samples")
)
PACKAGES = sorted(
    module.name
    for module in pkgutil.walk_packages(jaxkd.__path__, "jaxkd.")
    if module.ispkg
)
HEAVY = ("grain", "matplotlib", "nibabel", "orbax", "PIL", "sklearn", "tensorflow")

# Fails the import of TensorFlow, also where it is installed, and says who asked.
FORBID_TENSORFLOW = """
import sys, traceback

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "tensorboard"):
            traceback.print_stack()
            sys.exit(f"imports {name}")

sys.meta_path.insert(0, Forbid())
"""


def run(code: str) -> str:
    """Runs code in a fresh interpreter, without what the test session imported."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_jaxkd_adds_at_most_0_3_s_to_jax_and_flax():
    code = """
import time, jax, flax
start = time.perf_counter()
import jaxkd
print(time.perf_counter() - start)
"""
    fastest = min(float(run(code)) for _ in range(3))
    assert fastest <= 0.3


def test_import_jaxkd_imports_no_subpackage():
    code = "import sys, jaxkd; print(*(n for n in sys.modules if n[:5] == 'jaxkd'))"
    assert run(code).split() == ["jaxkd"]


@pytest.mark.parametrize(
    "statement", ["import jaxkd", "from jaxkd import distill, losses, models"]
)
def test_a_library_user_pays_for_no_heavy_module(statement):
    code = f"""
import sys, jax, flax, optax
before = set(sys.modules)
{statement}
print(*(name.partition(".")[0] for name in set(sys.modules) - before))
"""
    imported = set(run(code).split())
    assert "jaxkd" in imported
    assert not imported.intersection(HEAVY)


def test_no_module_of_jaxkd_imports_tensorflow():
    imports = "\n".join(f"import {name}" for name in MODULES)
    assert run(f"{FORBID_TENSORFLOW}\n{imports}\nprint('done')") == "done\n"


def test_every_package_imported_by_jaxkd_is_a_declared_dependency():
    root = Path(jaxkd.__path__[0])
    imported = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module)
    packages = {name.partition(".")[0] for name in imported}
    packages -= {"jaxkd", *sys.stdlib_module_names}
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = {
        re.split(r"[<>=\[]", requirement)[0].lower().replace("-", "_")
        for requirement in itertools.chain(project["dependencies"], *extras)
    }
    owners = importlib.metadata.packages_distributions()
    undeclared = {
        package
        for package in packages
        if declared.isdisjoint(
            owner.lower().replace("-", "_") for owner in owners.get(package, [package])
        )
    }
    assert not undeclared


def test_the_tensorflow_guard_itself_works():
    with pytest.raises(AssertionError, match="imports tensorflow"):
        run(f"{FORBID_TENSORFLOW}\nimport tensorflow")


@pytest.mark.parametrize("name", ["jaxkd", *PACKAGES])
def test_every_name_in_all_exists(name):
    package = importlib.import_module(name)
    missing = [public for public in package.__all__ if not hasattr(package, public)]
    assert not missing
    assert len(set(package.__all__)) == len(package.__all__)


@pytest.mark.parametrize("name", jaxkd.__all__)
def test_subpackages_are_attributes_of_jaxkd(name):
    assert getattr(jaxkd, name) is not None
    assert name in dir(jaxkd)


def test_an_unknown_attribute_of_jaxkd_is_named():
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = jaxkd.distil


@pytest.mark.parametrize("name", ["jaxkd", *MODULES])
def test_examples_in_docstrings_hold(name):
    module = importlib.import_module(name)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=options).failed == 0


def test_examples_in_docstrings_are_found():
    assert doctest.testmod(importlib.import_module("jaxkd.registry")).attempted > 0
