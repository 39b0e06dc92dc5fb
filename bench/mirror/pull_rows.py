"""Whole images: a crowd at once, far links, near ones, and what is there already."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence

from bench.errors import TrialFailed
from bench.figures import CPU_GIB, SECONDS, Figure, Sample
from bench.mirror.gate import Gate, Sent
from bench.mirror.images import CROWD, LINK, Image
from bench.mirror.mirrors import MirrorKind, address
from bench.mirror.relay import relay
from bench.mirror.stage import Stage, settled
from bench.servers import Server

GIB = 1 << 30
SENT = Figure("sent", "upstream sent, x image")
GETS = Figure("gets", "manifest GETs upstream")
HEADS = Figure("heads", "manifest HEADs upstream")
CLIENTS, PEER_CLIENTS = 32, 8
RATE = 8 << 20
"""Bytes a second of a slow link, for each connection."""
WARM_PULLS = 5
TRIES = 20


class Thundering:
    """Many clients ask for one image that the mirror does not have. docker-registry has fewer of them: it fetches for
    each."""

    name = "thundering"
    title = f"{CLIENTS} clients, cold image (peer: {PEER_CLIENTS})"
    figures: tuple[Figure, ...] = (SENT, GETS, HEADS, SECONDS)
    images: Sequence[Image] = (CROWD,)
    peer_rounds: int | None = None

    def trial(self, stage: Stage, mirror: MirrorKind) -> Sample:
        clients = CLIENTS if mirror.hosts else PEER_CLIENTS
        with stage.gate() as gate, stage.cold(mirror, gate.url) as server:
            pulled = stage.pull(server, CROWD, clients)
            settled(server)
        size, sent = stage.of(CROWD).size, gate.sent(CROWD.repo)
        if sent.content < size:
            raise TrialFailed(f"the upstream sent {sent.content} bytes of {size}: what was counted cannot be right")
        sample = {GETS.key: float(sent.manifest_gets), HEADS.key: float(sent.manifest_heads)}
        return {SENT.key: sent.content / size, SECONDS.key: pulled.seconds, **sample}


@contextlib.contextmanager
def limited(stage: Stage) -> Iterator[str]:
    """nginx with `limit_rate`."""
    with stage.gate(limit=str(RATE)) as gate:
        yield gate.url


@contextlib.contextmanager
def paced(stage: Stage) -> Iterator[str]:
    """A relay whose connections the kernel paces."""
    with relay(stage.origin.port, stage.folder / "relay", RATE) as port:
        yield address(port)


@contextlib.contextmanager
def direct(stage: Stage) -> Iterator[str]:
    """The upstream itself."""
    yield stage.origin.url


class Cold:
    """One client pulls an image the mirror does not have, over some link."""

    images: Sequence[Image] = (LINK,)
    peer_rounds: int | None = None

    def __init__(
        self,
        name: str,
        title: str,
        link: Callable[[Stage], contextlib.AbstractContextManager[str]],
        figures: tuple[Figure, ...] = (SECONDS,),
    ) -> None:
        self.name, self.title, self.figures, self._link = name, title, figures, link

    def trial(self, stage: Stage, mirror: MirrorKind) -> Sample:
        with self._link(stage) as upstream, stage.cold(mirror, upstream) as server:
            before = server.cpu()
            pulled = stage.pull(server, LINK)
            sample = {SECONDS.key: pulled.seconds}
            if CPU_GIB in self.figures:
                sample[CPU_GIB.key] = (settled(server) - before) * GIB / pulled.size
        return sample


class Warm:
    """The same image, once the mirror has all of it."""

    name = "warm"
    title = "warm pull of 200 MiB"
    figures: tuple[Figure, ...] = (SECONDS, CPU_GIB)
    images: Sequence[Image] = (LINK,)
    peer_rounds: int | None = None

    def trial(self, stage: Stage, mirror: MirrorKind) -> Sample:
        with stage.gate() as gate, stage.cold(mirror, gate.url) as server:
            known, before = self._warmed(stage, server, gate), server.cpu()
            pulls = [stage.pull(server, LINK) for _ in range(WARM_PULLS)]
            used = server.cpu() - before
        if gate.sent(LINK.repo).blobs != known.blobs:
            raise TrialFailed(f"{mirror.name} went upstream for blobs it had")
        size = sum(pulled.size for pulled in pulls)
        return {SECONDS.key: statistics.median(one.seconds for one in pulls), CPU_GIB.key: used * GIB / size}

    def _warmed(self, stage: Stage, server: Server, gate: Gate) -> Sent:
        """Pulls until a pull takes no blob from the upstream; what it has sent by then."""
        seen = Sent()
        for _ in range(TRIES):
            stage.pull(server, LINK)
            settled(server)
            last, seen = seen, gate.sent(LINK.repo)
            if seen.blobs == last.blobs:
                return seen
        raise TrialFailed(f"{server.name} went upstream for the same blobs {TRIES} times")
