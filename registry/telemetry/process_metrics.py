"""Metrics of the server's processes, read at each scrape (`process_metrics`)."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric

from registry import __version__
from registry.telemetry.metrics import Metrics


def process_metrics(metrics: Metrics, started_at: float) -> Iterator[Metric]:
    """Yields the metrics. `started_at`: when the server was started, in seconds since 1970. Reads files of /proc."""
    info = {"version": __version__, "python": platform.python_version()}
    yield InfoMetricFamily("entrepot_build", "The version of the server.", value=info)
    yield GaugeMetricFamily(
        "entrepot_start_time_seconds", "When the server was started, in seconds since 1970.", value=started_at
    )
    processes = metrics.cells.processes()
    yield GaugeMetricFamily("entrepot_workers", "Worker processes that are running.", value=len(processes))
    memory = GaugeMetricFamily(
        "entrepot_worker_resident_memory_bytes", "Resident memory of each worker process.", labels=["worker"]
    )
    for worker, pid in processes:
        if resident := _resident_bytes(pid):
            memory.add_metric([str(worker)], resident)
    yield memory


def _resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process; 0 if it has ended, and on systems without /proc."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
