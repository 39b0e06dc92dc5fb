"""What the mirrors' trials share, and what one of them is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.errors import TrialFailed
from bench.figures import Figure, Sample
from bench.mirror import gate as gates
from bench.mirror.images import PRIME, TAG, Held, Image
from bench.mirror.mirrors import MirrorKind
from bench.mirror.puller import Order, Pulled, pull
from bench.processes import TICKS
from bench.servers import Server, running

PRIMERS = 8
"""Clients that pull the first image, so that each worker has served some."""

REST, RESTLESS = 0.3, 60.0
"""Seconds: without work that make a mirror count as idle; until this must have come."""


@dataclass(frozen=True)
class Stage:
    """The upstream with its images, and a folder that is removed with the trial."""

    origin: Server
    held: Mapping[str, Held]
    """By repository."""
    folder: Path

    def of(self, image: Image) -> Held:
        return self.held[image.repo]

    def gate(self, limit: str | None = None) -> contextlib.AbstractContextManager[gates.Gate]:
        """nginx before the upstream."""
        return gates.gate(self.origin.port, self.folder / "gate", limit)

    @contextlib.contextmanager
    def cold(self, mirror: MirrorKind, upstream: str) -> Iterator[Server]:
        """A mirror of that address which has nothing yet but a small image. Raises BenchFailed, TrialFailed."""
        with running(mirror.of(upstream), self.folder / "mirror") as server:
            self.pull(server, PRIME, clients=PRIMERS)
            yield server

    def pull(self, server: Server, image: Image, clients: int = 1, verified: int | None = None) -> Pulled:
        """Raises TrialFailed unless every client gets all of the image."""
        pulled = pull(Order(server.port, image.repo, TAG, clients, verified=verified))
        if pulled.size != self.of(image).size * clients:
            raise TrialFailed(f"{clients} clients got {pulled.size} bytes of {image.repo}")
        return pulled


def settled(server: Server) -> float:
    """CPU seconds of a mirror once it has nothing more to do: docker-registry goes on storing what it has sent. Raises
    TrialFailed when it does not come to rest."""
    last, deadline = -1.0, time.monotonic() + RESTLESS
    while (now := server.cpu()) > last + 1 / TICKS:
        if time.monotonic() > deadline:
            raise TrialFailed(f"{server.name} is still busy {RESTLESS:.0f} s after its last request")
        last = now
        time.sleep(REST)
    return now


class MirrorRow(Protocol):
    """A line, or a few, of the table."""

    name: str
    """For `--only`."""
    title: str
    figures: tuple[Figure, ...]
    images: Sequence[Image]
    peer_rounds: int | None
    """The most rounds docker-registry takes part in; None: all."""

    def trial(self, stage: Stage, mirror: MirrorKind) -> Sample:
        """One, from a cold start on. Raises TrialFailed."""
        ...
