"""The page is one safe, self-contained, accessible file, whatever the run left."""

import html.parser
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxkd.report import ReportError, write_report

_VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = "<script>alert('x')</script>"


class Page(html.parser.HTMLParser):
    """Collects tags with attributes, and checks that they nest."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tags, self.open, self.words, self.mistakes = [], [], [], []
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.mistakes.append(tag)

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def prose(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def render(tmp_path):
    def make(*workdirs):
        output = tmp_path / "out" / "report.html"
        assert write_report(list(workdirs), output) == output
        return Page(output)

    return make


def check_sound(page):
    """What holds for every page."""
    assert not page.mistakes and not page.open
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', page.text)
    assert set(used) <= set(ids)
    for image in page.all("img"):
        assert image["alt"].strip()
    for picture in page.all("svg"):
        assert picture.get("aria-label", "").strip() or "aria-hidden" in picture


def check_self_contained(page):
    """No scripts, and nothing that a browser would fetch."""
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert not re.search(r"https?://|@import|\bon\w+=\"|javascript:", page.text)
    for _, attrs in page.tags:
        for name in ("src", "href"):
            assert attrs.get(name, "#").startswith(("#", "data:image/"))
    policy = next(a for a in page.all("meta") if "http-equiv" in a)
    assert "default-src 'none'" in policy["content"]


@pytest.mark.parametrize("kind", ["segmentation_run", "classification_run"])
def test_a_page_is_sound_and_self_contained(render, request, kind):
    page = render(request.getfixturevalue(kind)("demo"))
    check_sound(page)
    check_self_contained(page)
    assert "prefers-color-scheme: dark" in page.text
    assert any(a.get("name") == "viewport" for a in page.all("meta"))


def test_a_segmentation_page_tells_the_whole_story(render, segmentation_run):
    page = render(segmentation_run("demo"))
    for text in (
        "the student reaches Dice 0.9210",
        "HD95 (px)",
        "left out of the mean: teacher 1, student_alone 12",
        "Dice while training",
        "found (true positive)",
        "invented (false positive)",
        "missed (false negative)",
        "hlfd/plfd",
        "weight 0.9",
        "python -m jaxkd.main --config=configs/hlfd.py",
        "0123456789ab",
        "Synthetic numbers.",
        "background, liver",
    ):
        assert text in page.prose, text
    captions = re.findall(r"Dice \d\.\d{3}", page.prose)
    assert len(captions) >= 27  # nine slices, three networks


def test_the_best_of_a_column_is_marked_and_undefined_is_a_dash(
    render, segmentation_run
):
    page = render(segmentation_run(logged=False))
    cells = re.findall(r"<td( class=\"best\")?>([^<]*)", page.text)
    assert (' class="best"', "0.9312") in cells and ("", "0.9000") in cells
    assert (' class="best"', "+0.0098") in cells
    assert ("", "–") in cells
    assert "None" not in page.prose and "nan" not in page.prose


def test_a_classification_page_shows_images_and_confusions(render, classification_run):
    page = render(classification_run())
    assert len(page.all("img")) == 24
    assert "What is taken for what" in page.prose
    assert "Most frequent mistakes" in page.prose
    assert page.prose.count("Top-1 (%)") >= 2


def test_every_string_of_a_run_is_escaped(render, segmentation_run, classification_run):
    hostile = {
        "command": EVIL,
        "device": EVIL,
        "notes": [EVIL, '"><img src=x onerror=alert(1)>'],
        "versions": {EVIL: EVIL},
        "status": EVIL,
    }
    segmentation = segmentation_run(
        "a", classes=3, class_names=["background", EVIL, f"{EVIL}2"], **hostile
    )
    classification = classification_run("b", class_names=[EVIL] * 10, **hostile)
    for workdir in (segmentation, classification):
        text = (workdir / "summary.json").read_text()
        (workdir / "summary.json").write_text(text.replace("student_alone", "st<b>ud"))
        lines = (workdir / "metrics.jsonl").read_text()
        (workdir / "metrics.jsonl").write_text(
            lines.replace("focal_dice/focal", "<i>$x_1$").replace(
                "student_alone", "st<b>ud"
            )
        )
        (workdir / "config.json").write_text(json.dumps({"config": {EVIL: EVIL}}))
        page = render(workdir)
        check_sound(page)
        check_self_contained(page)
        assert "<script" not in page.text and "<img src=x" not in page.text
        assert not page.all("b") or all(tag != "i" for tag, _ in page.tags)
        assert EVIL in page.prose


def test_a_page_of_many_large_slices_stays_small(render, segmentation_run):
    page = render(segmentation_run(n=64, size=384, colour=True))
    assert len(page.text.encode()) < 3_000_000


def test_the_same_run_gives_the_same_page(tmp_path, segmentation_run):
    workdir = segmentation_run()
    first = write_report([workdir], tmp_path / "a.html").read_text()
    assert write_report([workdir], tmp_path / "b.html").read_text() == first


def test_three_classes_are_outlined_in_colours(render, segmentation_run):
    page = render(segmentation_run(classes=3))
    assert "taken for another class" in page.prose
    assert "true liver" in page.prose and "true tumour" in page.prose
    assert "Dice per class" in page.prose


def test_a_run_without_predictions_has_no_pictures_but_says_so(
    render, segmentation_run
):
    workdir = segmentation_run()
    (workdir / "predictions.npz").unlink()
    page = render(workdir)
    check_sound(page)
    assert "What the networks see" not in page.prose
    assert "There is no predictions.npz" in page.prose
    assert "Dice while training" in page.prose


def test_a_run_that_has_just_begun_gets_a_page(render, segmentation_run):
    workdir = segmentation_run()
    for name in ("summary.json", "predictions.npz", "config.json"):
        (workdir / name).unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    (workdir / "metrics.jsonl").write_text(f"{lines[0]}\n{lines[1][:20]}")
    page = render(workdir)
    check_sound(page)
    for text in (
        "unfinished",
        "No network has been evaluated yet.",
        "No stage has finished yet",
        "1 unreadable line(s)",
    ):
        assert text in page.prose, text


def test_a_summary_alone_gets_a_page(render, segmentation_run):
    workdir = segmentation_run()
    for name in ("metrics.jsonl", "predictions.npz", "config.json"):
        (workdir / name).unlink()
    page = render(workdir)
    check_sound(page)
    assert "0.9312" in page.prose


def test_an_almost_empty_summary_gets_a_page(render, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "summary.json").write_text('{"status": "running"}')
    page = render(tmp_path / "w")
    check_sound(page)
    assert "not finished" in page.prose


def test_several_runs_are_compared_and_seeds_are_averaged(
    render, segmentation_run, classification_run
):
    runs = [segmentation_run(f"seed{seed}", seed=seed, logged=False) for seed in (0, 1)]
    other = classification_run("digits")
    (other / "config.json").unlink()
    page = render(*runs, other)
    check_sound(page)
    check_self_contained(page)
    for text in (
        "3 runs",
        "seed0 · student_alone",
        "digits · student",
        "seed0, seed1 differ in their seed alone",
        "0.9312 ± 0.0000",
        "seeds 0, 1",
    ):
        assert text in page.prose, text


def test_runs_of_the_same_folder_name_are_told_apart(render, segmentation_run):
    page = render(*(segmentation_run(f"{a}/run", logged=False) for a in "ab"))
    check_sound(page)
    assert "run (1) · teacher" in page.prose and "run (2) · teacher" in page.prose


def test_a_folder_that_cannot_be_reported_is_one_clear_line(tmp_path):
    with pytest.raises(ReportError, match="at least one workdir"):
        write_report([], tmp_path / "x.html")
    with pytest.raises(ReportError, match="give the --workdir of a run") as error:
        write_report([tmp_path / "nowhere"], tmp_path / "x.html")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.html").exists()


def test_a_page_needs_no_pyplot_and_no_display(tmp_path, segmentation_run):
    workdir = segmentation_run()
    code = (
        "import sys, pathlib; from jaxkd.report import write_report; "
        f"write_report([pathlib.Path({str(workdir)!r})], "
        f"pathlib.Path({str(tmp_path / 'p.html')!r})); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_classification_images_in_colour_are_shown(render, classification_run):
    page = render(classification_run(size=32, colour=True, logged=False))
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))


def test_a_network_without_predictions_is_left_out_of_the_pictures(
    render, segmentation_run
):
    workdir = segmentation_run(logged=False)
    with np.load(workdir / "predictions.npz") as file:
        kept = {k: v for k, v in file.items() if k != "prediction/student"}
    np.savez(workdir / "predictions.npz", **kept)
    page = render(workdir)
    assert "chosen by the Dice of student_alone" in page.prose


def test_a_single_run_warns_of_chance_and_names_its_seed(render, segmentation_run):
    page = render(segmentation_run(seed=7, logged=False))
    assert "One run with seed 7: small differences may be chance." in page.prose


def test_the_last_network_stands_out_among_the_large_numbers(render, segmentation_run):
    page = render(segmentation_run(logged=False))
    (goal,) = re.findall(r'<div class="goal"><dt>(.*?)</dt>', page.text)
    assert goal == "student"


def test_alternatives_of_pictures_hold_the_numbers(render, segmentation_run):
    page = render(segmentation_run())
    labels = [attrs.get("aria-label", "") for attrs in page.all("svg")]
    assert any(re.fullmatch(r"Test record \d+: image", label) for label in labels)
    assert any(
        re.fullmatch(
            r"Test record \d+, student: Dice \d\.\d{3}, \d+ pixels right, "
            r"\d+ false positive, \d+ missed",
            label,
        )
        for label in labels
    )
    assert any(label.startswith("run, stage student: hlfd/plfd. ") for label in labels)


def test_an_output_is_replaced_and_its_folder_made(tmp_path, segmentation_run):
    workdir = segmentation_run(logged=False)
    output = tmp_path / "deep" / "er" / "report.html"
    output.parent.mkdir(parents=True)
    output.write_text("old")
    write_report([workdir], output)
    assert "old</" not in output.read_text() and output.stat().st_size > 10_000
