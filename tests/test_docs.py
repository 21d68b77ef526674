"""What README and docs say can be done, and the files they point to are there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(ROOT / folder / "README.md" for folder in ("bench", "launch")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def test_the_python_example_of_the_readme_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["value"].shape == (8,)
    assert names["outputs"].logits.shape == (1, 10)
    assert set(names["method"].weights) == {"ce", "kd"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [
        link
        for link in links
        if not re.match(r"https?:|mailto:", link)
        and not (page.parent / link).resolve().exists()
    ]
    assert not missing


def test_make_targets_and_config_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?\bmake ([a-z-]+)`?  ? ?#", text):
        assert re.search(rf"^{target}:", makefile, re.M), target
    configs = set(re.findall(r"--config=(configs/\w+\.py)", text))
    assert configs
    assert all((ROOT / name).is_file() for name in configs)


def test_every_page_of_the_site_is_in_its_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [
        page.relative_to(ROOT / "docs").as_posix()
        for page in (ROOT / "docs").rglob("*.md")
    ]
    assert not [page for page in pages if f": {page}\n" not in navigation]
