"""Tests of the benchmarks' report: medians, quartiles, ratios, goals, tables and plots."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.registries.registry_run import all_rows
from bench.report.goals import REGISTRY_GOALS, Goal, are_all_met, judge_goals, no_slower_goals
from bench.report.measurements import CPU, RATE, STEAL, RowSamples, median_ratio, results_document, spread
from bench.report.plot import curves, ratio_bars
from bench.report.tables import number_text, steal_note, text_table


def row_samples(ours: list[float], theirs: list[float]) -> RowSamples:
    samples = {"Entrepot": [{"rate": v} for v in ours], "docker-registry": [{"rate": v} for v in theirs]}
    return RowSamples("row", "a row", (RATE, CPU), samples)


def test_quartiles_of_seven() -> None:
    """The quartiles of seven samples are halfway between the second and the third sample from each end. The order of
    the samples does not matter."""
    measured = spread([7, 1, 6, 2, 5, 3, 4])
    assert (measured.low, measured.median, measured.high) == (2.5, 4, 5.5)


def test_spread_of_one_sample() -> None:
    """The median and both quartiles of a single sample are this sample."""
    measured = spread([3.0])
    assert (measured.low, measured.median, measured.high) == (3.0, 3.0, 3.0)


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=20))
def test_spread_is_ordered_and_within_the_samples(samples: list[float]) -> None:
    """Quartiles and median are in ascending order, and between the smallest and the largest sample."""
    measured = spread(samples)
    low, high = min(samples), max(samples)
    slack = 1e-9 * max(1.0, high)
    assert low - slack <= measured.low <= measured.median + slack <= measured.high + 2 * slack <= high + 3 * slack


def test_spread_of_no_samples_is_an_error() -> None:
    """The spread of no samples raises an error."""
    with pytest.raises(ValueError, match="no sample"):
        spread([])


def test_ratio_is_of_medians() -> None:
    """`median_ratio` divides the median of the first samples by the median of the second samples, so one outlier among
    the samples does not change the ratio."""
    assert median_ratio([10, 20, 9000], [5, 4, 6]) == 4


def test_ratio_to_zero() -> None:
    """A ratio to a median of 0 causes no division by zero. A CPU time is 0 if it is too short for the clock."""
    assert median_ratio([1], [0]) == float("inf")
    assert median_ratio([0], [0]) == 1


def test_every_goal_names_a_measured_row_and_figure() -> None:
    """Every goal names an existing row and figure, so no goal is skipped because of a typing error."""
    measured = {(row.name, figure.key) for row in all_rows() for figure in row.figures} | {("memory-peak", "pss")}
    assert {(goal.row, goal.key) for goal in REGISTRY_GOALS} <= measured


def test_names_of_rows_differ() -> None:
    """No two rows have the same name, so that the option `--only` can select each row by its name."""
    names = [row.name for row in all_rows()]
    assert len(set(names)) == len(names)


def test_goal_is_judged_by_the_ratio_of_medians() -> None:
    """A relative goal is met if the ratio of medians is on the right side of the bound. A ratio equal to the bound
    meets the goal."""
    measured = {"row": row_samples([20, 30, 40], [10])}
    for limit, at_least, met in ((3, True, True), (3.1, True, False), (3, False, True), (2.9, False, False)):
        goal = Goal("row", "rate", "", limit, at_least=at_least, relative=True)
        assert are_all_met(judge_goals(measured, (goal,))) is met


def test_an_older_version_sets_the_goals() -> None:
    """In a comparison with an older version, each cost may be up to 10 % above that of the older version. Rates have no
    goal."""
    measured = RowSamples("row", "a row", (RATE, CPU))
    measured.samples = {"Entrepot": [{"rate": 1, "cpu": 1.2}], "Entrepot old": [{"rate": 9, "cpu": 1}]}
    (goal,) = no_slower_goals([measured], "Entrepot old")
    assert (goal.key, goal.measured(measured), goal.met(1.1), goal.met(1.2)) == ("cpu", 1.2, True, False)


def test_goal_without_a_measurement_is_not_met() -> None:
    """A goal of a failed row is not met."""
    verdicts = judge_goals({"row": row_samples([], [10])}, (Goal("row", "rate", "", 1, at_least=True, relative=True),))
    assert verdicts[0][1] is None
    assert not are_all_met(verdicts)


def test_goals_of_unmeasured_rows_are_left_out() -> None:
    """With `--only`, only the goals of measured rows are judged."""
    assert judge_goals({}, REGISTRY_GOALS) == []


def test_results_keep_every_sample() -> None:
    """The JSON document has the samples, the quartiles and the ratio of each figure. A figure without samples has
    neither samples nor a ratio."""
    document = results_document([row_samples([2, 4], [1])], ["Entrepot", "docker-registry"], {"rounds": 2})
    rows = document["rows"]
    assert isinstance(rows, dict)
    assert rows["row"]["figures"]["rate"] == {
        "unit": "requests/s",
        "Entrepot": {"low": 2.5, "median": 3.0, "high": 3.5, "samples": [2, 4]},
        "docker-registry": {"low": 1, "median": 1, "high": 1, "samples": [1]},
        "ratio": 3.0,
    }
    assert rows["row"]["figures"]["cpu"] == {"unit": CPU.unit, "ratio": None}


def test_table_has_columns_of_one_width() -> None:
    """All lines of a table have the same length."""
    widths = {len(text) for text in text_table(["what", "a"], [["x", "1"], ["longer", "1234567"]]).splitlines()}
    assert len(widths) == 1


@pytest.mark.parametrize(
    ("value", "text"), [(12345.6, "12346"), (99.94, "99.9"), (1.234, "1.23"), (0.125, "0.12"), (0.0331, "0.0331")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    """Numbers have about three digits."""
    assert number_text(value) == text


def test_plots_are_complete_with_and_without_figures() -> None:
    """The plots are complete SVG documents, also with a single row or without any samples."""
    for measured_rows in ([], [row_samples([], [])], [row_samples([40], [1])]):
        assert ratio_bars(measured_rows, "Entrepot", "docker-registry").endswith("</svg>\n")
    assert "<polyline" in curves("title", [100, 10_000], {"a": [10.0, 9.0]})
    assert curves("title", [100], {"a": [10.0], "none": [0.0]}).endswith("</svg>\n")


def test_time_withheld_by_the_host_is_stored_and_printed() -> None:
    """The JSON document has, for each row, the CPU time that the host withheld from the virtual machine (steal time).
    The note below the table names only rows for which the steal time is large."""
    quiet, disturbed = row_samples([1], [2]), row_samples([1, 1, 1], [2])
    for sample, share in zip(disturbed.samples["Entrepot"], (0.0, 7.25, 3.5), strict=True):
        sample[STEAL.key] = share
    names = ["Entrepot", "docker-registry"]
    rows = results_document([disturbed], names, {})["rows"]
    assert isinstance(rows, dict)
    assert rows["row"]["figures"]["stolen"]["Entrepot"]["samples"] == [0.0, 7.25, 3.5]
    assert steal_note([disturbed], names).splitlines()[1:] == ["- a row: 3.5 % (Entrepot), 0.0 % (docker-registry)"]
    assert steal_note([quiet], names) == ""
