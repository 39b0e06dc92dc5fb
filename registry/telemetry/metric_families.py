"""Families of metrics: which cells hold which numbers (`Counter`, `Gauge`, `Histogram`, `CellPlan`).

A *cell* is one number in memory that all processes share. Each process writes to cells of its own, its *column*
(`registry.telemetry.shared_cells`). A *family* of metrics has a name, a help text and labels. Each combination of label
values is a *series*, and has cells of its own. All values of a label are listed before the fork, so that every process
knows the index of each cell. A value that is not in the list counts as the last value of the list, which is therefore
called `other` in most lists.

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
"""Name of each label, and all its values."""


class Family:
    """A family of metrics. It has `cell_count` cells, of which `first_cell` is the first. Each series has `width` of
    these cells."""

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
        self.first_cell = plan.add(self, self.cell_count)

    def cell(self, *values: str) -> int:
        """Returns the index of a series' first cell. `values`: one value for each label."""
        series_number = 0
        for value, positions in zip(values, self._positions, strict=True):
            series_number = series_number * len(positions) + positions.get(value, len(positions) - 1)
        return self.first_cell + series_number * self.width

    def series(self) -> Iterator[tuple[tuple[str, ...], int]]:
        """Yields the label values and the first cell of each series."""
        for series_number, values in enumerate(product(*self.labels.values())):
            yield values, self.first_cell + series_number * self.width

    def nonzero_series(self, totals: Sequence[float]) -> Iterator[tuple[tuple[str, ...], Sequence[float]]]:
        """Yields the label values and the numbers of each series that is not 0. `totals`: the numbers in all cells of
        the plan. Faster than `series`, because most series are 0."""
        family_totals = totals[self.first_cell : self.first_cell + self.cell_count]
        for series_number in dict.fromkeys(index // self.width for index, value in enumerate(family_totals) if value):
            yield (
                self._label_values(series_number),
                family_totals[series_number * self.width : (series_number + 1) * self.width],
            )

    def _label_values(self, series_number: int) -> tuple[str, ...]:
        """Returns the label values of a series, from its number."""
        values: list[str] = []
        for choices in reversed([*self.labels.values()]):
            series_number, position = divmod(series_number, len(choices))
            values.append(choices[position])
        return tuple(reversed(values))


class Counter(Family):
    """A family of numbers that only grow. The names of counters end in `_total`."""

    kind = "counter"


class Gauge(Family):
    """A family of numbers that grow and shrink. Only the numbers of running processes are added up."""

    kind = "gauge"


class Histogram(Family):
    """A family of distributions. The cells of a series: one for each bucket, one for values above the last bound, and
    one with the sum of all values."""

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
        """Returns the cell of the bucket for `value`, in the series whose first cell is `first_cell`."""
        return first_cell + bisect_left(self.bounds, value)

    def sum_cell(self, first_cell: int) -> int:
        """Returns the cell with the sum of all values, in the series whose first cell is `first_cell`."""
        return first_cell + self.width - 1


class CellPlan:
    """Gives each family its cells, one after the other. `size` is the number of all cells.

    Some numbers belong to several series. A process writes such a number to only one cell, a *source*, because each
    addition costs time in every request. `complete` later adds the number of each source to the cells of its series."""

    def __init__(self) -> None:
        self.families: list[Family] = []
        self.size = 0
        self._sources: list[tuple[int, tuple[int, ...]]] = []
        """Each source, and the cells that its number is added to."""

    def reserve(self, count: int) -> int:
        """Reserves `count` cells, and returns the index of the first one. Call it for cells that belong to no family,
        such as sources."""
        first_cell = self.size
        self.size += count
        return first_cell

    def add_source(self, source: int, *cells: int) -> None:
        """Makes `complete` add the number in the cell `source` to `cells`, none of which may be a source."""
        self._sources.append((source, cells))

    def complete(self, totals: list[float]) -> list[float]:
        """Adds the number of each source to the cells of its series. `totals`: the numbers of all cells. Returns
        `totals`, which it has changed."""
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
        """Returns a hash that is the same for two plans only if each cell means the same in both."""
        families = [
            (family.name, family.kind, [*map(list, family.labels.items())], getattr(family, "bounds", None))
            for family in self.families
        ]
        return hashlib.sha256(json.dumps([families, self._sources, self.size], default=list).encode()).hexdigest()

    def add(self, family: Family, count: int) -> int:
        """Adds a family that needs `count` cells. Returns the index of its first cell."""
        self.families.append(family)
        return self.reserve(count)
