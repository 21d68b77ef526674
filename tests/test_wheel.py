"""What `pip install` brings: the package with its data, and nothing else."""

import csv
import io
import pathlib
import subprocess
import sys
import zipfile

import pytest

import jaxkd

ROOT = pathlib.Path(__file__).resolve().parents[1]
SAMPLES = "jaxkd/data/samples/liver_ct"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_has_the_version_of_the_package(wheel):
    metadata = wheel.read(f"jaxkd-{jaxkd.__version__}.dist-info/METADATA").decode()
    assert f"Version: {jaxkd.__version__}\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata


def test_wheel_has_every_module_and_the_type_marker(wheel):
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "jaxkd").rglob("*.py")}
    assert modules <= set(wheel.namelist())
    assert "jaxkd/py.typed" in wheel.namelist()


def test_wheel_has_the_sample_slices_with_licence_and_attribution(wheel):
    names = set(wheel.namelist())
    assert {f"{SAMPLES}/LICENSE", f"{SAMPLES}/ATTRIBUTION.md"} <= names
    rows = csv.DictReader(io.StringIO(wheel.read(f"{SAMPLES}/index.csv").decode()))
    count = sum(1 for _ in rows)
    assert sum(n.startswith(f"{SAMPLES}/images/") for n in names) == count > 0
    assert sum(n.startswith(f"{SAMPLES}/masks/") for n in names) == count


def test_wheel_has_what_the_report_is_made_from(wheel):
    sources = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "jaxkd" / "report").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert sources <= set(wheel.namelist())


def test_wheel_has_nothing_but_the_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"jaxkd", f"jaxkd-{jaxkd.__version__}.dist-info"}
    assert not [n for n in wheel.namelist() if "__pycache__" in n]
