"""What a trial gives, and how many of them become one figure: medians, quartiles, ratios.

The samples of a run, and the JSON they are kept in.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One thing that is measured: its unit, and whether more of it is better."""

    key: str
    unit: str
    more: bool = False


RATE = Figure("rate", "requests/s", more=True)
CPU = Figure("cpu", "server CPU µs each")
TOKEN_COST = Figure("toll", "CPU to that without accounts")
P50 = Figure("p50", "p50 ms")
P99 = Figure("p99", "p99 ms")
SPEED = Figure("speed", "MiB/s", more=True)
CPU_GIB = Figure("cpu_gib", "server CPU s/GiB")
LOADER_GIB = Figure("loader_gib", "loader CPU s/GiB")
BULK = Figure("bulk", "bulk MiB/s meanwhile", more=True)
SECONDS = Figure("seconds", "s")
CPU_SECONDS = Figure("cpu_seconds", "server CPU s")
PSS = Figure("pss", "MiB PSS")
STEAL = Figure("stolen", "% of the processors taken by the host")
"""Of any trial. A host that is busy, or that keeps a virtual machine to a quota, stops it for tens of milliseconds."""

Sample = dict[str, float]
"""A trial's values, by figure key."""


@dataclass(frozen=True)
class Spread:
    """Samples in three numbers."""

    low: float
    """The first quartile."""
    median: float
    high: float
    """The third quartile."""


def spread(samples: Sequence[float]) -> Spread:
    """Median and quartiles; these lie within the samples (the inclusive method). Raises ValueError without a sample."""
    if not samples:
        raise ValueError("no sample")
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(low, median, high)


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of the medians. Infinite against nothing; 1 where both are nothing."""
    mine, other = spread(ours).median, spread(theirs).median
    if other == 0:
        return 1.0 if mine == 0 else float("inf")
    return mine / other


RESULTS_FOLDER = Path(__file__).resolve().parents[1] / "results"


@dataclass
class RowSamples:
    """A row of the table with all its samples."""

    name: str
    title: str
    figures: tuple[Figure, ...]
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """By server."""
    failure: str = ""
    """Why there are no more of them."""

    def values(self, server: str, figure: Figure) -> list[float]:
        return [sample[figure.key] for sample in self.samples.get(server, []) if figure.key in sample]

    def median(self, server: str, key: str) -> float | None:
        """None: there is no sample."""
        values = [sample[key] for sample in self.samples.get(server, []) if key in sample]
        return spread(values).median if values else None

    def ratio(self, ours: str, theirs: str, key: str) -> float | None:
        """Of the medians; None where one has no sample."""
        values = [[sample[key] for sample in self.samples.get(one, []) if key in sample] for one in (ours, theirs)]
        return median_ratio(*values) if all(values) else None


def results_document(
    lines: Sequence[RowSamples], subjects: Sequence[str], about: Mapping[str, object]
) -> dict[str, object]:
    """Everything: how it was measured, medians and quartiles, and each sample. The first subject is set against the
    second, where there are two."""
    rows: dict[str, object] = {}
    for line in lines:
        figures: dict[str, object] = {}
        looked_at = any(line.values(subject, STEAL) for subject in subjects)
        for figure in (*line.figures, *([STEAL] if looked_at else [])):
            one: dict[str, object] = {"unit": figure.unit}
            for subject in subjects:
                if values := line.values(subject, figure):
                    one[subject] = {**asdict(spread(values)), "samples": values}
            if len(subjects) == 2 and figure is not STEAL:
                one["ratio"] = line.ratio(subjects[0], subjects[1], figure.key)
            figures[figure.key] = one
        rows[line.name] = {"title": line.title, "figures": figures, "failure": line.failure}
    return {**about, "rows": rows}


def write_json(document: Mapping[str, object], paths: Sequence[Path]) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
