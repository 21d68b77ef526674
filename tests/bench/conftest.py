"""Scripts of bench/ as modules: `script("step")`."""

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import flax.linen as nn
import pytest

from jaxkd.layers import Outputs

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"


@pytest.fixture(scope="session")
def script():
    """Imports a script of bench/; what scripts import from each other is found."""
    loaded = {}

    def load(name):
        if name not in loaded:
            spec = importlib.util.spec_from_file_location(
                f"bench_{name}", BENCH / f"{name}.py"
            )
            module = importlib.util.module_from_spec(spec)
            # Dataclasses look their module up by name.
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            loaded[name] = module
        return loaded[name]

    # Last, so that no file of bench/ hides a package.
    sys.path.append(str(BENCH))
    yield load
    sys.path.remove(str(BENCH))
    for module in loaded.values():
        del sys.modules[module.__name__]


class Tiny(nn.Module):
    """The smallest network that can teach and learn."""

    num_classes: int
    features: int

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.relu(nn.Conv(self.features, (3, 3), strides=(8, 8))(images))
        return Outputs(logits=nn.Dense(self.num_classes)(x.mean((1, 2))), taps={})


@pytest.fixture(scope="session")
def tiny():
    """A network that compiles in no time, by the name that configs call it."""

    def make(*, num_classes, width_factor=1.0):
        return Tiny(num_classes, int(8 * width_factor))

    module = types.ModuleType("jaxkd_bench_tiny")
    module.make = make
    sys.modules[module.__name__] = module
    yield f"{module.__name__}:make"
    del sys.modules[module.__name__]


@pytest.fixture
def run_script():
    """Runs a script of bench/ as a user would, in a process with one JAX device."""

    def run(name, *arguments, prelude="", timeout=240):
        path = BENCH / name
        code = f"import runpy, sys\n{prelude}\n" + (
            f"sys.argv = [{str(path)!r}, *{list(arguments)!r}]\n"
            f"sys.path[0] = {str(BENCH)!r}\n"
            f"runpy.run_path({str(path)!r}, run_name='__main__')"
        )
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    return run
