"""The table of all methods: what is trained, kept and printed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "bench" / "distill_table.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_distill_table", PATH)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def results(**methods):
    return {
        "settings": {
            "pair": "a-b",
            "teacher_width": 1.0,
            "width": 0.5,
            "data": "digits",
            "epochs": 8,
            "teacher_epochs": 4,
            "seeds": 2,
        },
        "methods": methods,
        "refused": {"fsp": "other channels"},
        "teachers": {"teacher": [0.9, 0.92]},
        "metric": "accuracy",
        "device": "1 x cpu",
        "seconds": 120.0,
        "command": "python bench/distill_table.py",
    }


def row(scores, milliseconds):
    return {"scores": scores, "milliseconds": milliseconds, "params": 1, "stages": 1}


def test_rows_show_means_paired_gains_and_the_cost_of_a_step(bench):
    text = bench.markdown(
        results(
            none=row([0.70, 0.80], 2.0),
            kd=row([0.72, 0.82], 4.0),
            at=row([0.6, 0.9], 5),
        )
    )
    assert "| *teacher* | 91.00 ± 1.41 | | |" in text
    assert "| `none` | 75.00 ± 7.07 |  | 0.50 |" in text
    # The gain is the same for both seeds, although the scores differ much.
    assert "| `kd` | 77.00 ± 7.07 | +2.00 ± 0.00 | 1.00 |" in text
    assert "| `at` | 75.00 ± 21.21 | +0.00 ± 14.14 | 1.25 |" in text
    assert "8 epochs (teacher 4), 2 seeds" in text and "2.0 min in all" in text
    assert "`fsp` does not fit this pair: other channels" in text


def test_a_step_is_set_against_kd_of_its_own_process_and_every_device_is_named(bench):
    there = {"device": "4 x gpu", "kd_milliseconds": 0.5}
    text = bench.markdown(
        results(
            kd=row([0.7, 0.8], 4.0) | {"device": "1 x cpu", "kd_milliseconds": 4.0},
            at=row([0.7, 0.8], 1.0) | there,
            # Of a file from before rows had their own.
            sp=row([0.7, 0.8], 6.0),
        )
    )
    ratios = [line.split("|")[4].strip() for line in text.splitlines()[3:6]]
    assert ratios == ["1.00", "2.00", "1.50"]
    assert "; 1 x cpu, 4 x gpu; 2.0 min" in text


def test_a_busy_machine_keeps_no_times(bench):
    text = bench.markdown(results(none=row([0.7, 0.8], None), kd=row([0.7, 0.8], None)))
    assert "| `kd` | 75.00 ± 7.07 | +0.00 ± 0.00 |  |" in text


def test_the_baseline_and_kd_come_first_and_unknown_names_are_refused(bench, capsys):
    _, methods, _ = bench.parse(["--methods=dkd,kd"])
    assert methods == ["none", "kd", "dkd"]
    _, methods, _ = bench.parse(["--data=sample", "--methods=all"])
    assert methods[:2] == ["none", "kd"] and "cwd" in methods
    with pytest.raises(SystemExit):
        bench.parse(["--methods=nothing"])
    assert "no method 'nothing' for digits" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.parse(["--data=cifar100"])
    assert "--data=cifar100 needs --path" in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_goes_on_where_it_was_left_and_not_with_other_settings(
    bench, tiny, tmp_path, capsys
):
    out = tmp_path / "table.json"
    options = [f"--pair={tiny}-{tiny}", "--teacher-width=0.5", "--epochs=1"]
    options += ["--width=0.25", "--seeds=2"]
    options += ["--batch-size=480", f"--out={out}"]
    assert bench.main([*options, "--methods=none"]) == 0
    first = json.loads(out.read_text())
    assert set(first["methods"]) == {"none", "kd"}
    assert len(first["methods"]["kd"]["scores"]) == 2
    assert list(first["teachers"]) == ["teacher"]
    for each in first["methods"].values():
        assert each["kd_milliseconds"] == first["methods"]["kd"]["milliseconds"] > 0
        assert each["device"] == first["device"] and "jax" in each["versions"]
    assert bench.main([*options, "--methods=kd"]) == 0
    assert json.loads(out.read_text())["methods"] == first["methods"]
    assert "| `kd` |" in capsys.readouterr().out
    # Another process times a step of KD itself.
    assert bench.main([*options, "--methods=dkd"]) == 0
    again = json.loads(out.read_text())["methods"]
    added = again.pop("dkd")
    assert again == first["methods"]
    assert 0 < added["kd_milliseconds"] != first["methods"]["kd"]["milliseconds"]
    with pytest.raises(SystemExit, match="other settings"):
        bench.main([*options, "--width=0.5"])


def test_the_recipes_and_what_needs_no_teacher_agree(bench):
    shared = bench.shared
    for name in (*shared.TWO_PHASES, *shared.TWO_TEACHERS, *shared.WITHOUT_TEACHER):
        assert name in shared.RECIPES
