"""What the mirrors' trials share, and what one of them is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.errors import TrialFailed
from bench.loaders.image_pull import PullOrder, PullResult, pull_image
from bench.mirror import nginx_proxy as gates
from bench.mirror.mirror_images import TAG, WARM_UP_IMAGE, ImageSpec, PushedImage
from bench.mirror.mirror_servers import MirrorProgram
from bench.report.measurements import Figure, Sample
from bench.system.process_tree import CLOCK_TICKS
from bench.system.servers import RunningServer, started_server

WARM_UP_CLIENTS = 8
"""Clients that pull the first image, so that each worker has served some."""

IDLE_SECONDS, IDLE_TIMEOUT = 0.3, 60.0
"""Seconds: without work that make a mirror count as idle; until this must have come."""


@dataclass(frozen=True)
class MirrorSetup:
    """The upstream with its images, and a folder that is removed with the trial."""

    origin: RunningServer
    held: Mapping[str, PushedImage]
    """By repository."""
    folder: Path

    def of(self, image: ImageSpec) -> PushedImage:
        return self.held[image.repo]

    def gate(self, limit: str | None = None) -> contextlib.AbstractContextManager[gates.NginxProxy]:
        """nginx before the upstream."""
        return gates.running_nginx(self.origin.port, self.folder / "gate", limit)

    @contextlib.contextmanager
    def cold(self, mirror: MirrorProgram, upstream: str) -> Iterator[RunningServer]:
        """A mirror of that address which has nothing yet but a small image. Raises BenchFailed, TrialFailed."""
        with started_server(mirror.of(upstream), self.folder / "mirror") as server:
            self.pull(server, WARM_UP_IMAGE, clients=WARM_UP_CLIENTS)
            yield server

    def pull(
        self, server: RunningServer, image: ImageSpec, clients: int = 1, verified: int | None = None
    ) -> PullResult:
        """Raises TrialFailed unless every client gets all of the image."""
        pulled = pull_image(PullOrder(server.port, image.repo, TAG, clients, verified=verified))
        if pulled.size != self.of(image).size * clients:
            raise TrialFailed(f"{clients} clients got {pulled.size} bytes of {image.repo}")
        return pulled


def cpu_when_idle(server: RunningServer) -> float:
    """CPU seconds of a mirror once it has nothing more to do: docker-registry goes on storing what it has sent. Raises
    TrialFailed when it does not come to rest."""
    last, deadline = -1.0, time.monotonic() + IDLE_TIMEOUT
    while (now := server.cpu()) > last + 1 / CLOCK_TICKS:
        if time.monotonic() > deadline:
            raise TrialFailed(f"{server.name} is still busy {IDLE_TIMEOUT:.0f} s after its last request")
        last = now
        time.sleep(IDLE_SECONDS)
    return now


class MirrorRow(Protocol):
    """A line, or a few, of the table."""

    name: str
    """For `--only`."""
    title: str
    figures: tuple[Figure, ...]
    images: Sequence[ImageSpec]
    max_peer_rounds: int | None
    """The most rounds docker-registry takes part in; None: all."""

    def trial(self, stage: MirrorSetup, mirror: MirrorProgram) -> Sample:
        """One, from a cold start on. Raises TrialFailed."""
        ...
