"""Synthetic runs: made-up images, predictions and numbers in the files of a workdir."""

import json

import numpy as np
import pytest

NETWORKS = ("teacher", "student_alone", "student")


def disc(size, row, column, radius):
    rows, columns = np.indices((size, size))
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def stage(name, **values):
    teachers = ["teacher"] if name == "student" else []
    method = {"focal_dice/focal": 0.5, "focal_dice/dice": 0.5}
    if teachers:
        method |= {"hlfd/flfd": 0.1, "hlfd/plfd": 0.9}
    return {
        "name": name,
        "learner": name,
        "teachers": teachers,
        "method": method,
        "epochs": 4,
        "steps": 80,
        "handed_on_step": 60,
        "seconds": 61.0,
        "images_per_second": 123.4,
    } | values


def summary(task, class_names, results, **values):
    return {
        "status": "finished",
        "command": "python -m jaxkd.main --config=configs/hlfd.py --workdir=runs/x",
        "device": "1 x cpu",
        "seed": 0,
        "task": task,
        "data": {"source": "synthetic", "train_records": 160, "test_records": 12},
        "class_names": list(class_names),
        "stages": [stage(name) for name in NETWORKS],
        "results": results,
        "costs": {
            "teacher": {"params": 573_214, "macs": 2_345_000_000},
            "student_alone": {"params": 174_650, "macs": 93_800_000},
            "student": {"params": 174_650, "macs": 93_800_000},
        },
        "versions": {"python": "3.11.2", "jax": "0.10.2"},
        "notes": ["Synthetic numbers."],
    } | values


def records(stages, metrics, steps=range(10, 81, 10)):
    for entry in stages:
        for step in steps:
            terms = {k: 2.0 * np.exp(-step / 30) for k in entry["method"]}
            yield {
                "kind": "train",
                "stage": entry["name"],
                "step": step,
                "epoch": step / 20,
                "loss": sum(v * entry["method"][k] for k, v in terms.items()),
                "terms": terms,
                "learning_rate": 1e-3 * (1 - step / 100),
            }
            if step % 20 == 0:
                share = 1 - np.exp(-step / 30)
                yield {
                    "kind": "eval",
                    "stage": entry["name"],
                    "step": step,
                    "epoch": step / 20,
                    "network": entry["learner"],
                    **{k: v * share for k, v in metrics.items()},
                }


def write(path, content, lines, arrays):
    path.mkdir(parents=True, exist_ok=True)
    (path / "summary.json").write_text(json.dumps(content))
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (path / "config.json").write_text(
        json.dumps(
            {
                "config": {
                    "seed": content["seed"],
                    "stages": {name: {"epochs": 4} for name in NETWORKS},
                },
                "versions": {},
                "git_revision": "0123456789ab",
            }
        )
    )
    np.savez_compressed(path / "predictions.npz", **arrays)
    return path


SEGMENTATION_RESULTS = {
    "teacher": {
        "dice": 0.93124,
        "iou": 0.88,
        "ravd": -0.0121,
        "hd95": 5.213,
        "assd": 1.3,
        "hd95_undefined": 1.0,
    },
    "student_alone": {
        "dice": 0.9,
        "iou": 0.83,
        "ravd": 0.02,
        "hd95": None,
        "assd": None,
        "hd95_undefined": 12.0,
    },
    "student": {
        "dice": 0.921,
        "iou": 0.86,
        "ravd": 0.0098,
        "hd95": 6.2,
        "assd": 1.4,
        "hd95_undefined": 0.0,
    },
}


@pytest.fixture
def segmentation_run(tmp_path):
    """Writes a synthetic segmentation run; the student's Dice falls with the record.

    Curves take the longest to draw: tests that do not look at them use `logged=False`.
    """

    def make(
        name="run", *, n=12, size=64, classes=2, colour=False, logged=True, **values
    ):
        generator = np.random.default_rng(0)
        shape = (n, size, size, 3) if colour else (n, size, size)
        truth = np.stack([disc(size, size / 2, size / 2, size / 3)] * n).astype(int)
        if classes > 2:
            truth[:, :, size // 2 :] *= 2
        arrays = {
            "index": np.arange(100, 100 + n),
            "image": generator.integers(0, 256, size=shape, dtype=np.uint8),
            "truth": truth,
        }
        for shift, network in ((1, "teacher"), (3, "student_alone"), (0, "student")):
            moved = [
                np.roll(truth[i], shift + i * (network == "student"), axis=0)
                for i in range(n)
            ]
            arrays[f"prediction/{network}"] = np.stack(moved).astype(np.uint8)
        names = values.pop("class_names", ["background", "liver", "tumour"][:classes])
        content = summary("segmentation", names, SEGMENTATION_RESULTS, **values)
        metrics = {"dice": 0.9, "iou": 0.8}
        if classes > 2:
            metrics |= {f"dice/{c}": 0.9 for c in names[1:]}
        lines = records(content["stages"], metrics) if logged else ()
        return write(tmp_path / name, content, lines, arrays)

    return make


@pytest.fixture
def classification_run(tmp_path):
    """Writes a synthetic classification run; the student errs on the last records."""

    def make(
        name="digits", *, n=40, classes=10, size=8, colour=False, logged=True, **values
    ):
        generator = np.random.default_rng(1)
        shape = (n, size, size, 3) if colour else (n, size, size)
        truth = np.arange(n) % classes
        arrays = {
            "index": np.arange(n),
            "image": generator.integers(0, 256, size=shape, dtype=np.uint8),
            "truth": truth,
        }
        results = {}
        for network in NETWORKS:
            sure = np.linspace(0.9, 0.05, n)
            rest = (1 - sure) / (classes - 1)
            probabilities = np.repeat(rest[:, None], classes, axis=1)
            probabilities[np.arange(n), truth] = sure
            probabilities[np.arange(n), (truth + 1) % classes] += 1e-6
            guess = probabilities.argmax(1)
            confusion = np.zeros((classes, classes), int)
            np.add.at(confusion, (truth, guess), 1)
            arrays[f"prediction/{network}"] = guess
            arrays[f"probabilities/{network}"] = probabilities
            arrays[f"confusion/{network}"] = confusion
            results[network] = {"accuracy": float((guess == truth).mean()), "nll": 0.5}
        names = values.pop("class_names", [f"class {i}" for i in range(classes)])
        content = summary("classification", names, results, **values)
        lines = records(content["stages"], results["student"]) if logged else ()
        return write(tmp_path / name, content, lines, arrays)

    return make
