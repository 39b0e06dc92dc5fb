"""All that a trial of a mirror needs: the upstream, the program, and a folder of its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.errors import TrialFailed
from bench.loaders.image_pull import PullOrder, PullResult, pull_image
from bench.mirror.mirror_images import TAG, WARM_UP_IMAGE, ImageSpec, PushedImage
from bench.mirror.nginx_proxy import NginxProxy, running_nginx
from bench.system.process_tree import CLOCK_TICKS
from bench.system.servers import RunningServer, ServerProgram, started_server

WARM_UP_CLIENTS = 8
"""Clients that pull the first image, so that each worker has served some."""
IDLE_SECONDS = 0.3
"""Seconds without work after which a mirror counts as idle."""
IDLE_TIMEOUT = 60.0


@dataclass(frozen=True)
class MirrorTrial:
    """One trial of a row: a program in a round."""

    upstream: RunningServer
    images: Mapping[str, PushedImage]
    """The upstream's images by repository."""
    program: ServerProgram
    folder: Path

    def image(self, spec: ImageSpec) -> PushedImage:
        return self.images[spec.repo]

    def running_proxy(self, limit: str | None = None) -> contextlib.AbstractContextManager[NginxProxy]:
        """Runs nginx in front of the upstream. Raises BenchFailed."""
        return running_nginx(self.upstream.port, self.folder / "gate", limit)

    @contextlib.contextmanager
    def cold_mirror(self, upstream: str) -> Iterator[RunningServer]:
        """Runs a mirror of that URL, which has only a small image. Raises BenchFailed."""
        with started_server(self.program, self.folder / "mirror", upstream) as server:
            self.pull(server, WARM_UP_IMAGE, clients=WARM_UP_CLIENTS)
            yield server

    def pull(
        self, server: RunningServer, image: ImageSpec, clients: int = 1, verified: int | None = None
    ) -> PullResult:
        """Pulls an image. Raises TrialFailed unless every client gets all of it."""
        pulled = pull_image(PullOrder(server.port, image.repo, TAG, clients, verified=verified))
        if pulled.size != self.image(image).size * clients:
            raise TrialFailed(f"{clients} clients got {pulled.size} bytes of {image.repo}")
        return pulled


def wait_until_idle(server: RunningServer) -> None:
    """Waits until a mirror uses no more CPU time: docker-registry goes on storing what it has sent. Raises TrialFailed
    after IDLE_TIMEOUT."""
    last, deadline = -1.0, time.monotonic() + IDLE_TIMEOUT
    while (now := server.cpu()) > last + 1 / CLOCK_TICKS:
        if time.monotonic() > deadline:
            raise TrialFailed(f"{server.name} is still busy {IDLE_TIMEOUT:.0f} s after its last request")
        last = now
        time.sleep(IDLE_SECONDS)
