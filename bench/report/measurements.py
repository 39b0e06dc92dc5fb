"""Figures and their samples, the statistics of samples (medians, quartiles and ratios), and the JSON file of
results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """A quantity that the bench measures."""

    key: str
    """The name of the figure in samples and in the file of results."""
    unit: str


RATE = Figure("rate", "requests/s")
CPU = Figure("cpu", "server CPU µs each")
"""The server's CPU time for each request, in microseconds."""
TOKEN_COST = Figure("token_cost", "CPU / CPU without accounts")
"""The server's CPU time for a request with a token, divided by the CPU time for a request to a registry without
accounts."""
P50 = Figure("p50", "p50 ms")
P99 = Figure("p99", "p99 ms")
SPEED = Figure("speed", "MiB/s")
CPU_GIB = Figure("cpu_gib", "server CPU s/GiB")
LOADER_GIB = Figure("loader_gib", "loader CPU s/GiB")
BULK = Figure("bulk", "MiB/s of the bulk transfers")
"""The speed of the blob transfers that run while the other figures of the row are measured."""
SECONDS = Figure("seconds", "s")
CPU_SECONDS = Figure("cpu_seconds", "server CPU s")
PSS = Figure("pss", "MiB PSS")
STEAL = Figure("stolen", "% of the processors taken by the host")
"""Measured in every trial, because a host that is busy or enforces a quota stops a virtual machine for tens of ms."""

Sample = dict[str, float]
"""The values of one trial, by the key of the figure."""


@dataclass(frozen=True)
class Spread:
    """The median of samples, the first quartile (`low`) and the third quartile (`high`)."""

    low: float
    median: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Returns the median and the quartiles. With the inclusive method, the quartiles lie between the smallest and the
    largest sample. Raises ValueError if there are no samples."""
    if not samples:
        raise ValueError("no sample")
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(low, median, high)


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Returns the ratio of the median of `ours` to the median of `theirs`. The ratio is infinite if only the median of
    `theirs` is 0, and 1 if both medians are 0."""
    our_median, their_median = spread(ours).median, spread(theirs).median
    if their_median == 0:
        return 1.0 if our_median == 0 else float("inf")
    return our_median / their_median


@dataclass
class RowSamples:
    """A row of the table of results, with all samples of its figures."""

    name: str
    title: str
    figures: tuple[Figure, ...]
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """The samples of each subject, by the name of the subject: a server, a program, or a store."""
    failure: str = ""
    """The error after which the row was no longer measured; empty if there was none."""

    def values(self, subject: str, key: str) -> list[float]:
        return [sample[key] for sample in self.samples.get(subject, []) if key in sample]

    def median(self, subject: str, key: str) -> float | None:
        """Returns the median of a figure; None if there are no samples."""
        values = self.values(subject, key)
        return spread(values).median if values else None

    def ratio(self, ours: str, theirs: str, key: str) -> float | None:
        """Returns the ratio of the medians of two subjects; None if one of them has no samples."""
        our_values, their_values = self.values(ours, key), self.values(theirs, key)
        return median_ratio(our_values, their_values) if our_values and their_values else None


def results_document(
    measured_rows: Sequence[RowSamples], subjects: Sequence[str], about: Mapping[str, object]
) -> dict[str, object]:
    """Returns all results as a document for JSON: facts about the run, medians, quartiles, and each sample. With two
    subjects, each figure has the ratio of the first subject to the second."""
    rows: dict[str, object] = {}
    for row_samples in measured_rows:
        figures: dict[str, object] = {}
        has_steal = any(row_samples.values(subject, STEAL.key) for subject in subjects)
        for figure in (*row_samples.figures, *([STEAL] if has_steal else [])):
            entry: dict[str, object] = {"unit": figure.unit}
            for subject in subjects:
                if values := row_samples.values(subject, figure.key):
                    entry[subject] = {**asdict(spread(values)), "samples": values}
            if len(subjects) == 2 and figure is not STEAL:
                entry["ratio"] = row_samples.ratio(subjects[0], subjects[1], figure.key)
            figures[figure.key] = entry
        rows[row_samples.name] = {"title": row_samples.title, "figures": figures, "failure": row_samples.failure}
    return {**about, "rows": rows}


def write_json(document: Mapping[str, object], paths: Sequence[Path]) -> None:
    """Writes a document to each path."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
