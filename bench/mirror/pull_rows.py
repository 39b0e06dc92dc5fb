"""Rows of the table of the bench `mirror` for pulls of whole images: pulls by many clients, pulls over slow and fast
links to the upstream, and pulls of an image that the mirror has cached."""

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
"""Numbers of clients of Entrepot and of docker-registry. docker-registry gets fewer, because it fetches the image again
for each client."""
LINK_BYTES_PER_SECOND = 8 << 20
WARM_PULLS = 5
"""Number of measured pulls of a cached image."""
WARM_TRIES = 20
"""Number of pulls after which a mirror must have cached the whole image."""


def _pull_with_many_clients(trial: MirrorTrial) -> Sample:
    """Measures what the upstream sends while many clients pull the same image at the same time. The mirror does not
    have this image yet."""
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
    """Yields the URL of an nginx in front of the upstream. nginx limits the rate of each response (`limit_rate`)."""
    with trial.running_proxy(limit=str(LINK_BYTES_PER_SECOND)) as proxy:
        yield proxy.url


@contextlib.contextmanager
def paced_connections(trial: MirrorTrial) -> Iterator[str]:
    """Yields the URL of a relay in front of the upstream. The kernel limits the rate of each connection."""
    with running_relay(trial.upstream.port, trial.folder / "relay", LINK_BYTES_PER_SECOND) as port:
        yield local_url(port)


@contextlib.contextmanager
def direct_link(trial: MirrorTrial) -> Iterator[str]:
    """Yields the URL of the upstream itself."""
    yield trial.upstream.url


Link = Callable[[MirrorTrial], contextlib.AbstractContextManager[str]]


def _pull_cold(trial: MirrorTrial, *, link: Link) -> Sample:
    """Measures how long one client takes to pull an image that the mirror does not have yet."""
    with link(trial) as url, trial.cold_mirror(url) as server:
        meter = Meter(server)
        pulled = trial.pull(server, LINK_IMAGE)
        wait_until_idle(server)
        return {SECONDS.key: pulled.seconds, CPU_GIB.key: meter.cpu() * GIB / pulled.size}


def _pull_warm(trial: MirrorTrial) -> Sample:
    """Measures how long one client takes to pull an image that the mirror has cached."""
    with trial.running_proxy() as proxy, trial.cold_mirror(proxy.url) as server:
        warm_traffic = _warm_up(trial, server, proxy)
        meter = Meter(server)
        pulls = [trial.pull(server, LINK_IMAGE) for _ in range(WARM_PULLS)]
        used = meter.cpu()
    if proxy.sent(LINK_IMAGE.repo).blobs != warm_traffic.blobs:
        raise TrialFailed(f"{server.name} requested blobs upstream that it had")
    size = sum(pulled.size for pulled in pulls)
    return {SECONDS.key: statistics.median(each.seconds for each in pulls), CPU_GIB.key: used * GIB / size}


def _warm_up(trial: MirrorTrial, server: RunningServer, proxy: NginxProxy) -> UpstreamTraffic:
    """Pulls the image again and again until a pull makes the mirror request no more blobs from the upstream. Returns
    the upstream's traffic so far. Raises TrialFailed."""
    traffic = UpstreamTraffic()
    for _ in range(WARM_TRIES):
        trial.pull(server, LINK_IMAGE)
        wait_until_idle(server)
        previous, traffic = traffic, proxy.sent(LINK_IMAGE.repo)
        if traffic.blobs == previous.blobs:
            return traffic
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
