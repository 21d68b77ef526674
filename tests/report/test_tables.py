"""Result tables print what a summary holds, mark the best and explain the gaps."""

import math

import pytest

from jaxkd import report
from jaxkd.report import tables

RESULTS = {
    "teacher": {"dice": 0.93124, "hd95": 5.213, "ravd": -0.0121, "hd95_undefined": 1.0},
    "student_alone": {"dice": 0.9, "hd95": None, "ravd": 0.02, "hd95_undefined": 5.0},
    "student": {"dice": 0.921, "hd95": 6.2, "ravd": 0.0098, "hd95_undefined": 0.0},
}
COSTS = {
    "teacher": {"params": 36_628_546, "macs": 2_345_000_000},
    "student_alone": {"params": 174_650, "macs": 93_800_000},
    "student": {"params": 174_650, "macs": 93_800_000},
}
SUMMARY = {"results": RESULTS, "costs": COSTS}


def cells_of(table, network):
    row = dict(table.rows)[network]
    return {
        column.heading: cell for column, cell in zip(table.columns, row, strict=True)
    }


def test_the_text_table_is_exactly_this():
    assert report.results_table(SUMMARY).splitlines() == [
        "network         Dice  HD95 (px)     RAVD  params (M)  MACs (G)",
        "------------- ------  ---------  -------  ----------  --------",
        "teacher       0.9312*      5.21* -0.0121      36.629     2.345",
        "student_alone 0.9000          –  +0.0200       0.175     0.094",
        "student       0.9210       6.20  +0.0098*      0.175     0.094",
        "* best of its column.",
        "HD95 and ASSD are undefined where prediction or truth is empty; left out of "
        "the mean: teacher 1, student_alone 5.",
    ]


def test_the_markdown_table_is_exactly_this():
    assert report.results_markdown(SUMMARY).splitlines()[:4] == [
        "| network | Dice | HD95 (px) | RAVD | params (M) | MACs (G) |",
        "|---|---:|---:|---:|---:|---:|",
        "| teacher | **0.9312** | **5.21** | -0.0121 | 36.629 | 2.345 |",
        "| student_alone | 0.9000 | – | +0.0200 | 0.175 | 0.094 |",
    ]


def test_null_and_nan_print_alike():
    nan = {name: dict(r) for name, r in RESULTS.items()}
    nan["student_alone"]["hd95"] = math.nan
    assert report.results_table(SUMMARY | {"results": nan}) == report.results_table(
        SUMMARY
    )


def test_best_depends_on_what_is_good():
    table = tables.build_table(SUMMARY)
    best = {
        column.heading: [name for name, cells in table.rows if cells[i].best]
        for i, column in enumerate(table.columns)
    }
    assert best["Dice"] == ["teacher"]
    assert best["HD95 (px)"] == ["teacher"]
    assert best["RAVD"] == ["student"]
    assert best["params (M)"] == best["MACs (G)"] == []


def test_values_that_print_alike_are_best_together():
    results = {"a": {"dice": 0.90001}, "b": {"dice": 0.90002}, "c": {"dice": 0.8}}
    rows = dict(tables.build_table({"results": results}).rows)
    assert [rows[name][0].best for name in "abc"] == [True, True, False]


@pytest.mark.parametrize(
    "results",
    [
        {"a": {"dice": 0.9}},
        {"a": {"dice": 0.9}, "b": {"dice": None}},
        {"a": {"dice": 0.9}, "b": {"dice": 0.9}},
        {"a": {"unknown": 0.9}, "b": {"unknown": 0.8}},
    ],
)
def test_nothing_is_best_without_a_choice(results):
    table = tables.build_table({"results": results})
    assert not table.has_best
    assert "best" not in report.results_table({"results": results})


def test_a_metric_or_cost_that_a_network_lacks_is_a_dash():
    summary = {
        "results": {"a": {"dice": 0.9, "iou": 0.8}, "b": {"dice": 0.8}},
        "costs": {"a": {"params": 1_000_000, "macs": 2_000_000}},
    }
    cells = cells_of(tables.build_table(summary), "b")
    assert cells["IoU"].text == cells["params (M)"].text == "–"
    assert cells["MACs (M)"].text == "–"


def test_bytes_sent_have_a_column_where_a_network_sends_any():
    costs = {
        "a": {"params": 1_000_000, "macs": 2_000_000},
        "b": {"params": 1_000_000, "macs": 2_000_000, "bytes_sent": 2531},
    }
    summary = {"results": {n: {"accuracy": 0.5} for n in costs}, "costs": costs}
    table = tables.build_table(summary)
    assert cells_of(table, "b")["sent (B)"].text == "2531"
    assert cells_of(table, "a")["sent (B)"].text == "–"
    del costs["b"]["bytes_sent"]
    assert "sent (B)" not in cells_of(tables.build_table(summary), "b")


def test_small_networks_are_counted_in_millions_with_enough_digits():
    summary = {
        "results": {"a": {"accuracy": 0.9}, "b": {"accuracy": 0.8}},
        "costs": {
            "a": {"params": 78_000, "macs": 12_500_000},
            "b": {"params": 4_321, "macs": 700_000},
        },
    }
    table = tables.build_table(summary)
    assert cells_of(table, "a")["params (M)"].text == "0.0780"
    assert cells_of(table, "b")["params (M)"].text == "0.0043"
    assert cells_of(table, "b")["MACs (M)"].text == "0.700"


def test_scores_per_class_come_after_the_others_and_counts_are_no_columns():
    results = {"a": {"dice/liver": 1.0, "dice": 1.0, "hd95_undefined": 0.0, "x": 1.0}}
    headings = [c.heading for c in tables.build_table({"results": results}).columns]
    assert headings == ["Dice", "x", "Dice liver"]


def test_an_unknown_count_of_undefined_values_is_still_noted():
    results = {"a": {"score": 1.0, "score_undefined": 2.0}}
    (note,) = tables.build_table({"results": results}).notes
    assert note == "score: undefined; left out of the mean: a 2."


def test_no_results_are_said_to_be_none():
    assert "no network" in report.results_table({})
    assert "No network" in report.results_markdown({"results": {}})


def test_markdown_escapes_bars_in_names():
    text = report.results_markdown({"results": {"a|b": {"dice": 1.0}}})
    assert "| a\\|b | 1.0000 |" in text


def test_spread_gives_mean_deviation_and_seeds():
    summaries = [
        {
            "seed": seed,
            "results": {"a": {"dice": value}, "b": {"dice": 0.5}},
            "costs": {"a": {"params": 2_000_000, "macs": 1}},
        }
        for seed, value in ((1, 0.9), (2, 0.92), (3, 0.94))
    ]
    lines = report.spread_markdown(summaries).splitlines()
    assert lines[2].startswith("| a | **0.9200 ± 0.0200** | 2.00 |")
    assert lines[3].startswith("| b | 0.5000 ± 0.0000 | –")
    assert lines[-1].endswith("(ddof=1) over 3 runs, seeds 1, 2, 3.")


def seeds_with_gaps():
    """Three seeds; HD95 of the student is undefined in one, of `none` in all."""
    student = [(6.0, 1.0), (None, 7.0), (8.0, 0.0)]
    return [
        {
            "seed": seed,
            "results": {
                "teacher": {"dice": 0.9, "hd95": 5.0 + seed, "hd95_undefined": 0.0},
                "student": {"dice": 0.8, "hd95": hd95, "hd95_undefined": undefined},
                "none": {"dice": 0.7, "hd95": math.nan, "hd95_undefined": 9.0},
            },
        }
        for seed, (hd95, undefined) in enumerate(student)
    ]


def test_a_mean_over_fewer_runs_than_there_are_says_so():
    table = tables.build_spread_table(seeds_with_gaps())
    assert cells_of(table, "teacher")["HD95 (px)"].text == "6.00 ± 1.00"
    assert cells_of(table, "student")["HD95 (px)"].text == "7.00 ± 1.41 (2 of 3)"
    assert cells_of(table, "none")["HD95 (px)"].text == "–"
    assert cells_of(table, "student")["Dice"].text == "0.8000 ± 0.0000"
    assert table.notes == (
        "Mean ± standard deviation (ddof=1) over 3 runs, seeds 0, 1, 2.",
        "(n of 3): undefined in the other runs, which the mean leaves out.",
        "HD95 and ASSD are undefined where prediction or truth is empty; left out of "
        "the means of all runs together: student 8, none 27.",
    )


def test_seeds_trained_together_keep_the_notes_as_well():
    runs = seeds_with_gaps()
    by_seed = {
        name: [run["results"][name] for run in runs] for name in runs[0]["results"]
    }
    together = {**runs[0], "seeds": [0, 1, 2], "by_seed": by_seed}
    assert tables.build_table(together) == tables.build_spread_table(runs)
    assert "student 8, none 27" in report.results_table(together)


def test_whole_means_need_no_note():
    runs = seeds_with_gaps()
    for run in runs:
        run["results"] = {"teacher": run["results"]["teacher"]}
    (note,) = tables.build_spread_table(runs).notes
    assert note.startswith("Mean ±")


def test_spread_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one summary"):
        report.spread_markdown([])
