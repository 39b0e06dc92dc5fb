"""The rows about pulls of whole images: by many clients, over slow and fast links, and of an image that the mirror
has."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from functools import partial

from bench.errors import TrialFailed
from bench.mirror.mirror_images import LINK_IMAGE, SHARED_IMAGE
from bench.mirror.mirror_trial import MirrorTrial, wait_until_idle
from bench.mirror.nginx_proxy import NginxProxy, UpstreamTraffic
from bench.mirror.paced_relay import running_relay
from bench.random_content import GIB
from bench.report.measurements import CPU_GIB, SECONDS, Figure, Sample
from bench.runner import Row
from bench.system.servers import Meter, RunningServer, local_url

SENT = Figure("sent", "upstream sent, x image")
GETS = Figure("gets", "manifest GETs upstream")
HEADS = Figure("heads", "manifest HEADs upstream")
CLIENTS, PEER_CLIENTS = 32, 8
"""docker-registry has fewer clients, since it fetches for each of them."""
LINK_BYTES_PER_SECOND = 8 << 20
WARM_PULLS = 5
WARM_TRIES = 20


def _pull_with_many_clients(trial: MirrorTrial) -> Sample:
    """Many clients pull an image at once that the mirror does not have."""
    clients = CLIENTS if trial.program.is_entrepot else PEER_CLIENTS
    with trial.running_proxy() as proxy, trial.cold_mirror(proxy.url) as server:
        pulled = trial.pull(server, SHARED_IMAGE, clients)
        wait_until_idle(server)
    size, sent = trial.image(SHARED_IMAGE).size, proxy.sent(SHARED_IMAGE.repo)
    if sent.content < size:
        raise TrialFailed(f"the upstream sent {sent.content} bytes of {size}: the count cannot be right")
    return {
        SENT.key: sent.content / size,
        GETS.key: float(sent.manifest_gets),
        HEADS.key: float(sent.manifest_heads),
        SECONDS.key: pulled.seconds,
    }


@contextlib.contextmanager
def limited_requests(trial: MirrorTrial) -> Iterator[str]:
    """Gives the URL of nginx with `limit_rate`, which limits each request."""
    with trial.running_proxy(limit=str(LINK_BYTES_PER_SECOND)) as proxy:
        yield proxy.url


@contextlib.contextmanager
def paced_connections(trial: MirrorTrial) -> Iterator[str]:
    """Gives the URL of a relay whose connections the kernel paces."""
    with running_relay(trial.upstream.port, trial.folder / "relay", LINK_BYTES_PER_SECOND) as port:
        yield local_url(port)


@contextlib.contextmanager
def direct_link(trial: MirrorTrial) -> Iterator[str]:
    """Gives the URL of the upstream itself."""
    yield trial.upstream.url


Link = Callable[[MirrorTrial], contextlib.AbstractContextManager[str]]


def _pull_cold(trial: MirrorTrial, *, link: Link) -> Sample:
    """One client pulls an image that the mirror does not have."""
    with link(trial) as url, trial.cold_mirror(url) as server:
        meter = Meter(server)
        pulled = trial.pull(server, LINK_IMAGE)
        wait_until_idle(server)
        return {SECONDS.key: pulled.seconds, CPU_GIB.key: meter.cpu() * GIB / pulled.size}


def _pull_warm(trial: MirrorTrial) -> Sample:
    """One client pulls an image that the mirror has."""
    with trial.running_proxy() as proxy, trial.cold_mirror(proxy.url) as server:
        known = _warm_up(trial, server, proxy)
        meter = Meter(server)
        pulls = [trial.pull(server, LINK_IMAGE) for _ in range(WARM_PULLS)]
        used = meter.cpu()
    if proxy.sent(LINK_IMAGE.repo).blobs != known.blobs:
        raise TrialFailed(f"{server.name} requested blobs upstream that it had")
    size = sum(pulled.size for pulled in pulls)
    return {SECONDS.key: statistics.median(each.seconds for each in pulls), CPU_GIB.key: used * GIB / size}


def _warm_up(trial: MirrorTrial, server: RunningServer, proxy: NginxProxy) -> UpstreamTraffic:
    """Pulls until a pull requests no blob upstream, and returns the traffic until then. Raises TrialFailed."""
    seen = UpstreamTraffic()
    for _ in range(WARM_TRIES):
        trial.pull(server, LINK_IMAGE)
        wait_until_idle(server)
        last, seen = seen, proxy.sent(LINK_IMAGE.repo)
        if seen.blobs == last.blobs:
            return seen
    raise TrialFailed(f"{server.name} requested the same blobs upstream {WARM_TRIES} times")


def pull_rows() -> list[Row[MirrorTrial]]:
    """Returns the rows in the order in which they are measured."""
    many, cold = f"{CLIENTS} clients, cold image (peer: {PEER_CLIENTS})", "cold pull of 200 MiB"
    return [
        Row("thundering", many, (SENT, GETS, HEADS, SECONDS), _pull_with_many_clients),
        Row("slow-link", f"{cold}, 8 MiB/s a request", (SECONDS,), partial(_pull_cold, link=limited_requests)),
        Row("paced-link", f"{cold}, 8 MiB/s a connection", (SECONDS,), partial(_pull_cold, link=paced_connections)),
        Row("fast-link", f"{cold}, unthrottled", (SECONDS, CPU_GIB), partial(_pull_cold, link=direct_link)),
        Row("warm", "warm pull of 200 MiB", (SECONDS, CPU_GIB), _pull_warm),
    ]
