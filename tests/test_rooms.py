"""Imports between the folders of jaxkd follow the table of docs/design.md."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# These hold no theme of their own and import nothing of jaxkd.
GROUND = ("numerics", "registry")


def rooms() -> dict[str, set[str]]:
    """What each room may import, read off the table, with what those rooms may."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `jaxkd/(\w+)(?:/|\.py)` \|.*\| (.*) \|$", page, re.M)
    allowed: dict[str, set[str]] = {name: set() for name in GROUND}
    for room, cell in rows:
        above = set(allowed)
        words = set(re.findall(r"\w+", cell))
        named = above if "all" in words else words & {name for name, _ in rows}
        assert named <= above, f"{room} may import {named - above}, which stand below"
        allowed[room] = set(GROUND) - {room} if room in GROUND else set(GROUND)
        for other in named:
            allowed[room] |= {other} | allowed[other]
    return allowed


def room_of(module: str) -> str:
    """`jaxkd.distill.method` -> `distill`; the package itself is ''."""
    return ".".join(module.split(".")[1:2])


def imported_modules(path: pathlib.Path) -> set[str]:
    """Modules of jaxkd that a file imports, also inside functions, or uses by name."""
    package = ["jaxkd", *path.relative_to(ROOT / "jaxkd").parts[:-1]]
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # What a module does as a command is no part of what it is for others.
    tree.body = [node for node in tree.body if not is_command(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from jaxkd import losses` names a room in its list of names.
            if module == "jaxkd":
                found |= {f"jaxkd.{alias.name}" for alias in node.names}
            else:
                found.add(module)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            # `import jaxkd` gives every room as an attribute.
            found.add(f"{node.value.id}.{node.attr}")
    return {name for name in found if name.startswith("jaxkd.")}


def is_command(node: ast.stmt) -> bool:
    """Whether a statement is `if __name__ == "__main__":`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == (
        "__name__ == '__main__'"
    )


# jaxkd/__init__.py names every room and imports none (tests/test_import.py).
FILES = sorted(
    path
    for path in (ROOT / "jaxkd").rglob("*.py")
    if path != ROOT / "jaxkd" / "__init__.py"
)
ROOMS = rooms()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards_only(path):
    module = "jaxkd." + ".".join(path.relative_to(ROOT / "jaxkd").with_suffix("").parts)
    room = room_of(module)
    assert room in ROOMS, f"docs/design.md has no row for jaxkd/{room}"
    allowed = ROOMS[room] | {room, "__version__"}
    wrong = {name for name in imported_modules(path) if room_of(name) not in allowed}
    assert not wrong, f"{room} may import {sorted(ROOMS[room])}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import jaxkd.losses.dense", {"jaxkd.losses.dense"}),
        ("from jaxkd import losses, models", {"jaxkd.losses", "jaxkd.models"}),
        ("def f():\n  from jaxkd.data import load", {"jaxkd.data"}),
        ("from . import method", {"jaxkd.distill"}),
        ("from ..losses import kd", {"jaxkd.losses"}),
        ("from .. import losses", {"jaxkd.losses"}),
        ("import jaxkd\nx = jaxkd.losses.kd", {"jaxkd.losses"}),
        ("import jaxkd", set()),
        ("import jax\nfrom jaxkdx import y", set()),
        ("if __name__ == '__main__':\n  import jaxkd.main", set()),
        ("if __name__ != '__main__':\n  import jaxkd.main", {"jaxkd.main"}),
    ],
)
def test_the_reader_of_imports_sees_every_form(tmp_path, monkeypatch, source, found):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "jaxkd" / "distill" / "kd.py"
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    assert imported_modules(path) == found


def test_the_table_forbids_what_the_design_forbids():
    assert "training" not in ROOMS["losses"]
    assert "losses" not in ROOMS["models"]
    assert "models" not in ROOMS["distill"]
    assert {"losses", "layers"} <= ROOMS["distill"]
    assert ROOMS["main"] >= set(ROOMS) - {"main"}
