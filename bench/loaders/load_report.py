"""The report of a loader. Each loader is a separate program. It prints its report as one line: the word `BENCH` and
then a JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.errors import TrialFailed
from bench.report.measurements import CPU, P50, P99, RATE, Sample
from bench.system.programs import run_to_end
from bench.system.servers import Meter, RunningServer

MARGIN_SECONDS = 30.0
"""Seconds that a loader may run longer than its measurement, for its start and its report."""


@dataclass(frozen=True)
class LoadReport:
    """The measurements of a loader. All its requests got the expected response."""

    requests: int
    seconds: float
    p50: float
    """Median latency in milliseconds."""
    p99: float

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def run_loader(command: Sequence[str], seconds: float, size: int = 0) -> LoadReport:
    """Runs a loader that measures for `seconds`. `size`: number of bytes that each response body must have. Raises
    TrialFailed when the loader or a request failed."""
    return parse_report(run_to_end(command, seconds + MARGIN_SECONDS), size)


def measure_load(server: RunningServer, run: Callable[[], LoadReport]) -> Sample:
    """Runs a loader and returns its figures, together with the server's CPU time for each request."""
    meter = Meter(server)
    report = run()
    cpu = meter.cpu() / report.requests * 1e6
    return {RATE.key: report.rate, CPU.key: cpu, P50.key: report.p50, P99.key: report.p99}


def print_report(times: Sequence[float], received: int, seconds: float) -> None:
    """Prints the report of a loader that is written in Python. `times`: the latency of each request, in seconds."""
    ordered = sorted(times)
    p50, p99 = (round(ordered[int(len(times) * part)] * 1e6) if times else 0 for part in (0.5, 0.99))
    report = {"requests": len(times), "microseconds": round(seconds * 1e6), "bytes": received, "errors": 0}
    print("BENCH", json.dumps({**report, "p50": p50, "p99": p99}))


def parse_report(out: str, size: int) -> LoadReport:
    """Returns the report in a loader's output. Raises TrialFailed if a request failed, if there was none, or if the
    bodies are shorter than `size` on average."""
    lines = [line.removeprefix("BENCH ") for line in out.splitlines() if line.startswith("BENCH ")]
    if not lines:
        raise TrialFailed(f"the loader printed no report: {out[-300:]!r}")
    report = json.loads(lines[-1])
    if report["errors"] or not report["requests"]:
        raise TrialFailed(f"{report['errors']} of {report['requests']} requests failed")
    if report["bytes"] < size * report["requests"]:
        wanted = f"{report['requests']} bodies of {size} bytes"
        raise TrialFailed(f"{wanted} were expected, and only {report['bytes']} bytes came")
    return LoadReport(report["requests"], report["microseconds"] / 1e6, report["p50"] / 1e3, report["p99"] / 1e3)
