"""`Chart` computes the positions and sizes of the bars of a chart."""

from __future__ import annotations

from itertools import pairwise

from registry.ui.charts import HEIGHT, WIDTH, Chart


def test_bars_are_in_proportion() -> None:
    """The highest bar fills the chart. The bars of several series for one value stand on top of each other."""
    chart = Chart.of([10, 0, 30], [0, 0, 10])
    assert (chart.highest, chart.totals) == (40, [40, 10])
    first, lower, upper = chart.parts
    assert (first.height, lower.height, upper.height) == (HEIGHT / 4, HEIGHT * 3 / 4, HEIGHT / 4)
    assert [part.series for part in chart.parts] == [0, 0, 1]
    assert first.y + first.height == HEIGHT
    assert upper.y == 0
    assert upper.y + upper.height == lower.y
    assert lower.x == upper.x > first.x + first.width


def test_every_bar_is_visible_and_inside_the_chart() -> None:
    """Very small values are still visible beside large ones. No bar is outside of the chart, and none has a negative
    size."""
    chart = Chart.of([1, 2**60, 1], [2**60, 1, 0], [1, 1, 1])
    assert len(chart.parts) == 8
    for part in chart.parts:
        assert 0 <= part.x < part.x + part.width <= WIDTH
        assert 0 <= part.y < HEIGHT
        assert part.height > 1
    starts = sorted({part.x for part in chart.parts})
    assert all(right - left > 1 for left, right in pairwise(starts))


def test_zero_values_have_no_bars() -> None:
    """If all values are zero, or there are no values, there are no bars."""
    assert Chart.of([0, 0], [0, 0]).parts == []
    assert Chart.of([], []) == Chart([], 0, [0, 0])
