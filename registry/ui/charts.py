"""`Chart`: where the bars of a small chart are, which a template draws as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WIDTH: Final = 600
HEIGHT: Final = 100
"""The size of a chart in the units of its SVG, which a page stretches."""
_GAP: Final = 0.2
"""The share of a bar's place that stays empty."""
_LEAST_HEIGHT: Final = 1.5
"""How high a part of a bar is at least if its value is not 0, so that it can be seen."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a bar: a rectangle. `series`: the number of its series."""

    series: int
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars that are made up of the values of each series, one above the other. `highest`: the sum of the highest bar's
    values. `totals`: the sum of each series."""

    parts: Sequence[Part]
    highest: int
    totals: Sequence[int]

    @classmethod
    def of(cls, *series: Sequence[int]) -> Chart:
        """Returns the chart of series of the same length, whose values are not negative."""
        bars = list(zip(*series, strict=True))
        highest = max(map(sum, bars), default=0)
        place = WIDTH / max(1, len(bars))
        parts: list[Part] = []
        for number, values in enumerate(bars):
            top = float(HEIGHT)
            for of_series, value in enumerate(values):
                if value:
                    height = max(_LEAST_HEIGHT, value / highest * HEIGHT)
                    top = max(0.0, top - height)
                    x, width = (number + _GAP / 2) * place, place * (1 - _GAP)
                    parts.append(Part(of_series, round(x, 2), round(top, 2), round(width, 2), round(height, 2)))
        return cls(parts, highest, [sum(values) for values in series])
