"""Whole images: a crowd at once, far links, near ones, and what is there already."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence

from bench.errors import TrialFailed
from bench.mirror.mirror_images import LINK_IMAGE, SHARED_IMAGE, ImageSpec
from bench.mirror.mirror_servers import MirrorProgram, local_url
from bench.mirror.mirror_setup import MirrorSetup, cpu_when_idle
from bench.mirror.nginx_proxy import NginxProxy, UpstreamTraffic
from bench.mirror.paced_relay import running_relay
from bench.report.measurements import CPU_GIB, SECONDS, Figure, Sample
from bench.system.servers import RunningServer

GIB = 1 << 30
SENT = Figure("sent", "upstream sent, x image")
GETS = Figure("gets", "manifest GETs upstream")
HEADS = Figure("heads", "manifest HEADs upstream")
CLIENTS, PEER_CLIENTS = 32, 8
LINK_BYTES_PER_SECOND = 8 << 20
"""Bytes a second of a slow link, for each connection."""
WARM_PULLS = 5
WARM_TRIES = 20


class ThunderingHerdRow:
    """Many clients ask for one image that the mirror does not have. docker-registry has fewer of them: it fetches for
    each."""

    name = "thundering"
    title = f"{CLIENTS} clients, cold image (peer: {PEER_CLIENTS})"
    figures: tuple[Figure, ...] = (SENT, GETS, HEADS, SECONDS)
    images: Sequence[ImageSpec] = (SHARED_IMAGE,)
    max_peer_rounds: int | None = None

    def trial(self, stage: MirrorSetup, mirror: MirrorProgram) -> Sample:
        clients = CLIENTS if mirror.hosts else PEER_CLIENTS
        with stage.gate() as gate, stage.cold(mirror, gate.url) as server:
            pulled = stage.pull(server, SHARED_IMAGE, clients)
            cpu_when_idle(server)
        size, sent = stage.of(SHARED_IMAGE).size, gate.sent(SHARED_IMAGE.repo)
        if sent.content < size:
            raise TrialFailed(f"the upstream sent {sent.content} bytes of {size}: what was counted cannot be right")
        sample = {GETS.key: float(sent.manifest_gets), HEADS.key: float(sent.manifest_heads)}
        return {SENT.key: sent.content / size, SECONDS.key: pulled.seconds, **sample}


@contextlib.contextmanager
def request_limited_link(stage: MirrorSetup) -> Iterator[str]:
    """nginx with `limit_rate`."""
    with stage.gate(limit=str(LINK_BYTES_PER_SECOND)) as gate:
        yield gate.url


@contextlib.contextmanager
def connection_paced_link(stage: MirrorSetup) -> Iterator[str]:
    """A relay whose connections the kernel paces."""
    with running_relay(stage.origin.port, stage.folder / "relay", LINK_BYTES_PER_SECOND) as port:
        yield local_url(port)


@contextlib.contextmanager
def direct_link(stage: MirrorSetup) -> Iterator[str]:
    """The upstream itself."""
    yield stage.origin.url


class ColdPullRow:
    """One client pulls an image the mirror does not have, over some link."""

    images: Sequence[ImageSpec] = (LINK_IMAGE,)
    max_peer_rounds: int | None = None

    def __init__(
        self,
        name: str,
        title: str,
        link: Callable[[MirrorSetup], contextlib.AbstractContextManager[str]],
        figures: tuple[Figure, ...] = (SECONDS,),
    ) -> None:
        self.name, self.title, self.figures, self._link = name, title, figures, link

    def trial(self, stage: MirrorSetup, mirror: MirrorProgram) -> Sample:
        with self._link(stage) as upstream, stage.cold(mirror, upstream) as server:
            before = server.cpu()
            pulled = stage.pull(server, LINK_IMAGE)
            sample = {SECONDS.key: pulled.seconds}
            if CPU_GIB in self.figures:
                sample[CPU_GIB.key] = (cpu_when_idle(server) - before) * GIB / pulled.size
        return sample


class WarmPullRow:
    """The same image, once the mirror has all of it."""

    name = "warm"
    title = "warm pull of 200 MiB"
    figures: tuple[Figure, ...] = (SECONDS, CPU_GIB)
    images: Sequence[ImageSpec] = (LINK_IMAGE,)
    max_peer_rounds: int | None = None

    def trial(self, stage: MirrorSetup, mirror: MirrorProgram) -> Sample:
        with stage.gate() as gate, stage.cold(mirror, gate.url) as server:
            known, before = self._warmed(stage, server, gate), server.cpu()
            pulls = [stage.pull(server, LINK_IMAGE) for _ in range(WARM_PULLS)]
            used = server.cpu() - before
        if gate.sent(LINK_IMAGE.repo).blobs != known.blobs:
            raise TrialFailed(f"{mirror.name} went upstream for blobs it had")
        size = sum(pulled.size for pulled in pulls)
        return {SECONDS.key: statistics.median(one.seconds for one in pulls), CPU_GIB.key: used * GIB / size}

    def _warmed(self, stage: MirrorSetup, server: RunningServer, gate: NginxProxy) -> UpstreamTraffic:
        """Pulls until a pull takes no blob from the upstream; what it has sent by then."""
        seen = UpstreamTraffic()
        for _ in range(WARM_TRIES):
            stage.pull(server, LINK_IMAGE)
            cpu_when_idle(server)
            last, seen = seen, gate.sent(LINK_IMAGE.repo)
            if seen.blobs == last.blobs:
                return seen
        raise TrialFailed(f"{server.name} went upstream for the same blobs {WARM_TRIES} times")
