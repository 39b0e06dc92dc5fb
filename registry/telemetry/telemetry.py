"""`Telemetry`: what one server counts and logs about itself, and where its readers find it."""

from __future__ import annotations

import os

from registry.config import Settings
from registry.telemetry.metrics import Metrics
from registry.telemetry.request_recorder import RequestRecorder


class Telemetry:
    """The metrics of a server, and the recorder of its requests. Create it before the fork, so that all workers share
    the metrics. Call `start_worker` in each worker.

    `metrics_port`: the port that serves nothing but the metrics; None: there is none."""

    def __init__(self, settings: Settings, metrics_port: int | None = None) -> None:
        self.metrics = Metrics([upstream.name for upstream in settings.upstream], settings.workers)
        self.requests = RequestRecorder(self.metrics)
        self.metrics_port = metrics_port
        self._counting_pid: int | None = None

    def start_worker(self) -> None:
        """Makes this process count for itself. Does nothing if it does already."""
        if self._counting_pid != os.getpid():
            self._counting_pid = os.getpid()
            self.metrics.start_worker()
