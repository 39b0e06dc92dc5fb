"""A trial of the bench `mirror`. It has the upstream, the program that runs as a mirror, and a folder."""

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
"""Number of clients that pull WARM_UP_IMAGE: enough that each worker process serves some requests."""
IDLE_SECONDS = 0.3
"""A mirror that uses at most one clock tick of CPU time in this many seconds counts as idle."""
IDLE_TIMEOUT = 60.0  # seconds


@dataclass(frozen=True)
class MirrorTrial:
    """One trial: the measurement of one row with one program in one round."""

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
        """Runs a mirror of the URL `upstream` until the block ends. Its cache has only WARM_UP_IMAGE. Raises
        BenchFailed."""
        with started_server(self.program, self.folder / "mirror", upstream) as server:
            self.pull(server, WARM_UP_IMAGE, clients=WARM_UP_CLIENTS)
            yield server

    def pull(
        self, server: RunningServer, image: ImageSpec, clients: int = 1, verified: int | None = None
    ) -> PullResult:
        """Pulls an image with `clients` clients. Raises TrialFailed unless every client gets the whole image."""
        pulled = pull_image(PullOrder(server.port, image.repo, TAG, clients, verified=verified))
        if pulled.size != self.image(image).size * clients:
            raise TrialFailed(f"{clients} clients got {pulled.size} bytes of {image.repo}")
        return pulled


def wait_until_idle(server: RunningServer) -> None:
    """Waits until a mirror is idle: docker-registry may still be storing a blob after it has sent the blob to the
    client. Raises TrialFailed after IDLE_TIMEOUT."""
    last_cpu, deadline = -1.0, time.monotonic() + IDLE_TIMEOUT
    while (cpu := server.cpu()) > last_cpu + 1 / CLOCK_TICKS:
        if time.monotonic() > deadline:
            raise TrialFailed(f"{server.name} is still busy {IDLE_TIMEOUT:.0f} s after its last request")
        last_cpu = cpu
        time.sleep(IDLE_SECONDS)
