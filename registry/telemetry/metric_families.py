"""Families of metrics: which cells hold which numbers (`Counter`, `Gauge`, `Histogram`, `CellPlan`).

A *cell* is one number in shared memory. Each process has its own copy of all cells, its *column*, and writes only to
this copy (`registry.telemetry.shared_cells`). A *family* of metrics has a name, a help text and labels. Each
combination of label values is a *series*, and has one or more cells.

All values of a label are listed before the fork, so that every process knows the index of each cell. A value that is
not in the list counts as the last value of the list. In most lists, the last value is `other`.

Names and types follow the Prometheus documentation ("Metric and label naming", "Histograms and summaries").
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Literal

Labels = Mapping[str, Sequence[str]]
"""Maps the name of each label to all values of the label."""


class Family:
    """A family of metrics. `first_cell`: index of the family's first cell. `cell_count`: number of its cells. `width`:
    number of cells of each series."""

    kind: Literal["counter", "gauge", "histogram"]

    def __init__(
        self, plan: CellPlan, name: str, help_text: str, labels: Labels | None = None, *, width: int = 1
    ) -> None:
        self.name = name
        self.help_text = help_text
        self.labels = labels or {}
        self._positions = [
            {value: position for position, value in enumerate(values)} for values in self.labels.values()
        ]
        self.width = width
        self.cell_count = prod(len(values) for values in self.labels.values()) * width
        self.first_cell = plan.add_family(self, self.cell_count)

    def cell(self, *values: str) -> int:
        """Returns the index of a series' first cell. `values`: one value for each label."""
        series_number = 0
        for value, positions in zip(values, self._positions, strict=True):
            series_number = series_number * len(positions) + positions.get(value, len(positions) - 1)
        return self.first_cell + series_number * self.width

    def series(self) -> Iterator[tuple[tuple[str, ...], int]]:
        """Yields the label values of each series, and the index of its first cell."""
        for series_number, values in enumerate(product(*self.labels.values())):
            yield values, self.first_cell + series_number * self.width

    def nonzero_series(self, totals: Sequence[float]) -> Iterator[tuple[tuple[str, ...], Sequence[float]]]:
        """Yields the label values and the numbers of each series that has a number other than 0. `totals`: the numbers
        of all cells of the plan. Faster than `series`, because most numbers are 0."""
        family_totals = totals[self.first_cell : self.first_cell + self.cell_count]
        for series_number in dict.fromkeys(index // self.width for index, value in enumerate(family_totals) if value):
            yield (
                self._label_values(series_number),
                family_totals[series_number * self.width : (series_number + 1) * self.width],
            )

    def _label_values(self, series_number: int) -> tuple[str, ...]:
        """Returns the label values of the series with the index `series_number` in the family."""
        values: list[str] = []
        for choices in reversed([*self.labels.values()]):
            series_number, position = divmod(series_number, len(choices))
            values.append(choices[position])
        return tuple(reversed(values))


class Counter(Family):
    """A family of numbers that only grow. Its name ends in `_total`."""

    kind = "counter"


class Gauge(Family):
    """A family of numbers that grow and shrink. Only the numbers of running processes are added up."""

    kind = "gauge"


class Histogram(Family):
    """A family of distributions. A series has one cell for each bucket, one cell for values above the last bound, and
    one cell with the sum of all values."""

    kind = "histogram"

    def __init__(
        self, plan: CellPlan, name: str, help_text: str, labels: Labels | None = None, *, bounds: Sequence[float]
    ) -> None:
        """`bounds`: the upper bound of each bucket, ascending."""
        self.bounds = list(bounds)
        super().__init__(plan, name, help_text, labels, width=len(bounds) + 2)

    def observe(self, cells: memoryview[float], first_cell: int, value: float) -> None:
        """Adds `value` to the series whose first cell is `first_cell`. `cells`: the column of this process."""
        # Computes the cells here, because each call of `bucket_cell` and `sum_cell` would take time in every request.
        cells[first_cell + bisect_left(self.bounds, value)] += 1
        cells[first_cell + self.width - 1] += value

    def bucket_cell(self, first_cell: int, value: float) -> int:
        """Returns the cell of the bucket for `value`. `first_cell`: the first cell of the series."""
        return first_cell + bisect_left(self.bounds, value)

    def sum_cell(self, first_cell: int) -> int:
        """Returns the cell with the sum of all values. `first_cell`: the first cell of the series."""
        return first_cell + self.width - 1


class CellPlan:
    """Assigns cells to each family. `size`: the number of all cells.

    Some numbers count in several series. To save time in each request, a process writes such a number to only one cell,
    called a *source*. `add_to_series` later adds the number of each source to the cells of these series."""

    def __init__(self) -> None:
        self.families: list[Family] = []
        self.size = 0
        self._sources: list[tuple[int, tuple[int, ...]]] = []
        """Each source, and the cells that its number is added to."""

    def reserve(self, count: int) -> int:
        """Reserves `count` cells that belong to no family, such as sources. Returns the index of the first cell."""
        first_cell = self.size
        self.size += count
        return first_cell

    def add_source(self, source: int, *cells: int) -> None:
        """Makes the cell `source` a source, whose number `add_to_series` adds to each of `cells`. `cells`: cells of
        series. None of them may be a source."""
        self._sources.append((source, cells))

    def add_to_series(self, totals: list[float]) -> list[float]:
        """Adds the number of each source to the cells of its series. `totals`: the numbers of all cells. Changes
        `totals` and returns it."""
        for source, cells in self._sources:
            if total := totals[source]:
                for cell in cells:
                    totals[cell] += total
        return totals

    def gauge_cells(self) -> Iterator[int]:
        """Yields the indexes of the cells that belong to gauges."""
        for family in self.families:
            if family.kind == "gauge":
                yield from (cell for _, cell in family.series())

    def layout_hash(self) -> str:
        """Returns a hash. If two plans have the same hash, each cell has the same meaning in both plans."""
        families = [
            (family.name, family.kind, [*map(list, family.labels.items())], getattr(family, "bounds", None))
            for family in self.families
        ]
        return hashlib.sha256(json.dumps([families, self._sources, self.size], default=list).encode()).hexdigest()

    def add_family(self, family: Family, count: int) -> int:
        """Adds a family that needs `count` cells. Returns the index of its first cell."""
        self.families.append(family)
        return self.reserve(count)
