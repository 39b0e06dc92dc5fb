"""Large blobs, and what small requests feel of them."""

from __future__ import annotations

import time

from bench import curl, wrk
from bench.bulk import bulk
from bench.content import ACCEPT, MIB, renew
from bench.figures import BULK, CPU_GIB, LOADER_GIB, P50, P99, RATE, SPEED, Figure, Sample
from bench.processes import children_cpu
from bench.rows.row import REPO, Stage
from bench.servers import Server
from bench.touching import touch_memory
from bench.wire import Client

GIB = 1 << 30
PULLS = 4
PUSHED = "bench/pushed"


class BulkPull:
    """A large blob, by as many programs at once, one after the other for about the trial's time."""

    figures: tuple[Figure, ...] = (SPEED, CPU_GIB, LOADER_GIB)
    rounds: int | None = None

    def __init__(self, name: str, title: str, at_once: int) -> None:
        self.name, self.title, self._at_once = name, title, at_once

    def prepare(self, stage: Stage, server: Server) -> None:
        stage.fill_large(server)

    def trial(self, stage: Stage, server: Server, number: int) -> Sample:
        large = stage.large
        times = max(1, round(stage.seconds / self._at_once))
        url = f"{server.url}/v2/{REPO}/blobs/{large.digest}"
        before, loaders = server.cpu(), children_cpu()
        speed = curl.pull(url, large.size, times, self._at_once)
        gib = large.size * times * self._at_once / GIB
        return {
            SPEED.key: speed,
            CPU_GIB.key: (server.cpu() - before) / gib,
            LOADER_GIB.key: (children_cpu() - loaders) / gib,
        }


class BulkPush:
    """POST, one streamed PATCH, PUT; new content each time, and the time is that of all three."""

    name = "push-256m"
    title = "push of 256 MiB"
    figures: tuple[Figure, ...] = (SPEED, CPU_GIB, LOADER_GIB)
    rounds: int | None = None

    def prepare(self, stage: Stage, server: Server) -> None:
        pass

    def trial(self, stage: Stage, server: Server, number: int) -> Sample:
        content = renew(stage.pushed)
        touch_memory(GIB)  # last, since what is free goes back to the host within a second or two
        gib = content.size / GIB
        with Client(server.port) as client:
            before, loaders, begun = server.cpu(), children_cpu(), time.perf_counter()
            where = client.start_upload(PUSHED)
            where = curl.patch(server.url + where, stage.pushed)
            client.close_upload(where, content.digest)
            seconds = time.perf_counter() - begun
            sample = {
                SPEED.key: content.size / MIB / seconds,
                CPU_GIB.key: (server.cpu() - before) / gib,
                LOADER_GIB.key: (children_cpu() - loaders) / gib,
            }
            path = f"/v2/{PUSHED}/blobs/{content.digest}"
            client.ask("HEAD", path, headers={"Accept": "*/*"}, expect=200)
        return sample


class UnderBulk:
    """Manifests by tag while four bulk pulls and a bulk push run. No memory is touched before: what the pushes leave of
    it would go back to the host during the trial, which may stop the whole machine for 30 ms at a time."""

    name = "manifest-under-bulk"
    title = "manifest by tag beside 4 pulls, 1 push"
    figures: tuple[Figure, ...] = (P99, P50, RATE, BULK)
    rounds: int | None = None

    def prepare(self, stage: Stage, server: Server) -> None:
        stage.fill_large(server)
        _ = stage.pushed  # made now: what is written in a trial disturbs it

    def trial(self, stage: Stage, server: Server, number: int) -> Sample:
        with bulk(server, REPO, stage.large.digest, PULLS, stage.pushed) as moved:
            before, begun = moved(), time.perf_counter()
            seen = wrk.load(
                f"{server.url}/v2/{REPO}/manifests/latest",
                stage.seconds,
                size=len(stage.body),
                headers={"Accept": ACCEPT},
            )
            speed = (moved() - before) / MIB / (time.perf_counter() - begun)
        return {P99.key: seen.p99, P50.key: seen.p50, RATE.key: seen.rate, BULK.key: speed}
