"""Runs adapters on folders of reference vectors: see README.md here."""

import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill
from jaxkd.layers import NetworkSpec, Outputs

HERE = Path(__file__).parent
FAMILIES = ("distill", "arch", "compress", "trust")
# (rtol, atol) of a file that does not state its own, as its family's README has it.
TOLERANCES = {"arch": (1e-5, 1e-5), "trust": (1e-10, 1e-10)}
DEFAULT_TOLERANCE = (1e-5, 1e-6)
NUMBER = r"((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("golden")
    group.addoption("--golden-dir", type=Path, help="folder of reference vectors")
    group.addoption(
        "--golden-strict",
        action="store_true",
        help="a file that has no adapter is a failure",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" in metafunc.fixturenames:
        paths, _ = _sorted_files(metafunc.config)
        metafunc.parametrize("golden_case", paths, ids=lambda p: p.stem, indirect=True)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    _, missing = _sorted_files(config)
    if missing:
        terminalreporter.section("golden files without an adapter")
        terminalreporter.write_line(", ".join(p.stem for p in missing))


@pytest.fixture
def golden_case(request: pytest.FixtureRequest) -> "Case":
    path = request.param
    adapter, skipped = ADAPTERS[path.stem]
    return Case(Vectors(path), adapter, skipped)


@pytest.fixture
def golden_missing(pytestconfig: pytest.Config) -> list[str]:
    return [p.stem for p in _sorted_files(pytestconfig)[1]]


@pytest.fixture
def golden_strict(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.getoption("--golden-strict", default=False)


@pytest.fixture
def make_case() -> Callable[..., "Case"]:
    """Builds a case from arrays, to test the harness itself."""

    def make(path: Path, arrays: Mapping, adapter, skipped=None) -> Case:
        np.savez(path, **arrays)
        return Case(Vectors(path), adapter, skipped or {})

    return make


def _folder(config: pytest.Config) -> Path:
    return config.getoption("--golden-dir", default=None) or HERE


def _sorted_files(config: pytest.Config) -> tuple[list[Path], list[Path]]:
    """Files with an adapter, and files without one."""
    folder = _folder(config)
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise pytest.UsageError(f"--golden-dir: no .npz files in {folder}")
    known = [p for p in paths if p.stem in ADAPTERS]
    return known, [p for p in paths if p.stem not in ADAPTERS]


class Vectors:
    """The arrays of one file; remembers which of them were read."""

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}
        self.name = path.stem
        self.read = {"source", "notes", "tolerance"}
        self.tolerances: dict[str, tuple[float, float]] = {}

    def numpy(self, key: str) -> np.ndarray:
        self.read.add(key)
        return self.arrays[key]

    def __getitem__(self, key: str) -> jax.Array:
        return jnp.asarray(self.numpy(key))

    def hp(self, name: str):
        """A hyper-parameter as a Python number, string or list."""
        return self.numpy(f"hp_{name}").tolist()

    def keys(self, pattern: str) -> list[str]:
        """The keys that match a pattern, numbers in numeric order."""
        found = [k for k in self.arrays if re.fullmatch(pattern, k)]
        return sorted(
            found, key=lambda k: [int(n) if n.isdigit() else n for n in _parts(k)]
        )

    def differentiate(self, function: Callable) -> dict[str, jax.Array]:
        """The loss, its parts and every gradient that the file holds.

        Args:
          function: from a dict of all `in_` and `w_` arrays to the scalar loss, or to
            the loss and a dict of parts named as the file's `out_` keys.
        """
        inputs = {k: jnp.asarray(self.arrays[k]) for k in self.keys(r"(in|w)_.*")}
        gradients = self.keys(r"grad_.*")
        names = {k: _input_of(k, inputs) for k in gradients}
        chosen = {name: inputs[name] for name in names.values()}

        def loss(chosen: dict) -> tuple[jax.Array, dict]:
            value = function(_Recorded({**inputs, **chosen}, self.read))
            return value if isinstance(value, tuple) else (value, {})

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, parts), grads = run(chosen)
        parts = {f"out_{k}": v for k, v in parts.items()}
        return {"out_loss": value, **parts, **{k: grads[names[k]] for k in gradients}}

    def tolerance(self, key: str) -> tuple[float, float]:
        """`(rtol, atol)` for one array of the file."""
        if key in self.tolerances:
            return self.tolerances[key]
        family = self.name.split("_")[0]
        rtol, atol = TOLERANCES.get(family, DEFAULT_TOLERANCE)
        if "tolerance" in self.arrays:
            text = str(self.arrays["tolerance"])
            rtol = _number_after("rtol", text, rtol)
            atol = _number_after("atol", text, atol)
        if key.startswith("grad_"):
            return self.gradient_tolerance(key, rtol)
        return rtol, atol

    def gradient_tolerance(self, key: str, rtol: float = 0.0) -> tuple[float, float]:
        """Gradients: 1e-4 relative, 1e-5 of the largest entry absolute."""
        return max(rtol, 1e-4), max(rtol, 1e-5) * float(np.abs(self.arrays[key]).max())

    @staticmethod
    def apply(
        method: distill.Method,
        *,
        student: Outputs,
        teachers: tuple[Outputs, ...] = (),
        batch: Mapping[str, jax.Array] | None = None,
        state: Callable = lambda params, memory: (params, memory),
        data: Mapping[str, Any] | None = None,
        epoch: int = 0,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs a method as the train step does.

        Args:
          method: the method.
          student: its outputs.
          teachers: theirs.
          batch: labels.
          state: replaces the method's initial params and memory.
          data: fields of the `DataSpec`.
          epoch: of the step.

        Returns:
          The weighted sum of the reduced terms, and each term.
        """
        key = jax.random.key(0)
        fields = {"records": 8, "num_classes": student.logits.shape[-1], "epochs": 1}
        fields |= {"batch_size": 8, "steps_per_epoch": 1, **(data or {})}
        specs = distill.Specs(
            student=NetworkSpec.from_outputs("student", student),
            teachers=tuple(NetworkSpec.from_outputs("teacher", t) for t in teachers),
            data=distill.DataSpec(**fields),
        )
        params, memory = state(*method.init(key, specs))
        step = jnp.asarray(epoch * fields["steps_per_epoch"], jnp.int32)
        inputs = distill.Inputs(
            student=student,
            teachers=teachers,
            batch=batch or {},
            key=key,
            progress=distill.Progress(
                step=step, epoch=jnp.asarray(epoch), epochs=fields["epochs"]
            ),
        )
        terms, _ = method.terms(params, memory, inputs)
        means = {name: jnp.mean(value) for name, value in terms.items()}
        total = sum(
            distill.weight_at(method.weights[name], step) * mean
            for name, mean in means.items()
        )
        return jnp.asarray(total), means


class _Recorded(dict):
    """The inputs of an adapter's loss; notes the keys that it looks up."""

    def __init__(self, inputs: Mapping[str, jax.Array], read: set[str]):
        super().__init__(inputs)
        self.read = read

    def __getitem__(self, key: str) -> jax.Array:
        self.read.add(key)
        return super().__getitem__(key)


class Case:
    """One file and its adapter."""

    def __init__(self, vectors: Vectors, adapter: Callable, skipped: Mapping[str, str]):
        self.vectors, self.adapter, self.skipped = vectors, adapter, skipped

    def check(self) -> None:
        """Fails unless the adapter reads or reproduces every array of the file."""
        vectors = self.vectors
        results = self.adapter(vectors)
        problems = [
            f"{key}: not in the file" for key in results.keys() - vectors.arrays
        ]
        for key in vectors.arrays:
            if key in results:
                problems += self._compare(key, np.asarray(results[key]))
            elif key not in vectors.read and key not in self.skipped:
                problems.append(f"{key}: neither read nor reproduced")
        if problems:
            pytest.fail(f"{vectors.name}\n" + "\n".join(problems), pytrace=False)

    def _compare(self, key: str, got: np.ndarray) -> list[str]:
        want = self.vectors.arrays[key]
        if got.shape != want.shape:
            return [f"{key}: shape {got.shape}, expected {want.shape}"]
        rtol, atol = self.vectors.tolerance(key)
        got, want = got.astype(np.float64), want.astype(np.float64)
        if np.allclose(got, want, rtol, atol, equal_nan=True):
            return []
        differences = np.abs(got - want)
        differences = differences[~np.isnan(differences)]
        return [
            f"{key}: largest difference {differences.max(initial=0.0):.3g}, "
            f"{np.sum(np.isnan(got) != np.isnan(want))} unexpected NaN "
            f"(rtol {rtol:g}, atol {atol:g})"
        ]


def _number_after(name: str, text: str, default: float) -> float:
    """The number in "name 1e-5" or "name=1e-5", else the default."""
    found = re.search(rf"\b{name}\s*[=:]?\s*{NUMBER}", text.lower())
    return float(found[1]) if found else default


def _parts(key: str) -> list[str]:
    return [part for part in re.split(r"(\d+)", key) if part]


def _input_of(gradient: str, inputs: Mapping[str, jax.Array]) -> str:
    name = gradient.removeprefix("grad_")
    return name if name in inputs else f"in_{name}"


def _load_adapters() -> dict[str, tuple[Callable, Mapping[str, str]]]:
    """Every function in adapters/ that is named as a file of vectors."""
    adapters = {}
    for path in sorted((HERE / "adapters").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"golden_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        skipped = getattr(module, "SKIPPED", {})
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith(tuple(f"{family}_" for family in FAMILIES)):
                assert name not in adapters, f"two adapters are called {name}"
                adapters[name] = (function, skipped.get(name, {}))
    return adapters


ADAPTERS = _load_adapters()
