"""What a trial gives, and how many of them become one figure: medians, quartiles, ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One thing that is measured: its unit, and whether more of it is better."""

    key: str
    unit: str
    more: bool = False


RATE = Figure("rate", "requests/s", more=True)
CPU = Figure("cpu", "server CPU µs each")
TOLL = Figure("toll", "CPU to that without accounts")
P50 = Figure("p50", "p50 ms")
P99 = Figure("p99", "p99 ms")
SPEED = Figure("speed", "MiB/s", more=True)
CPU_GIB = Figure("cpu_gib", "server CPU s/GiB")
LOADER_GIB = Figure("loader_gib", "loader CPU s/GiB")
BULK = Figure("bulk", "bulk MiB/s meanwhile", more=True)
SECONDS = Figure("seconds", "s")
CPU_SECONDS = Figure("cpu_seconds", "server CPU s")
PSS = Figure("pss", "MiB PSS")
STOLEN = Figure("stolen", "% of the processors taken by the host")
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


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of the medians. Infinite against nothing; 1 where both are nothing."""
    mine, other = spread(ours).median, spread(theirs).median
    if other == 0:
        return 1.0 if mine == 0 else float("inf")
    return mine / other
