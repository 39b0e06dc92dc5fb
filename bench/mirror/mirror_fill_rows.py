"""Large blobs on their way in: how soon they begin, what they cost, and what others feel of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.errors import TrialFailed
from bench.loaders import wrk
from bench.loaders.http_client import HttpClient
from bench.mirror.mirror_images import FIRST_BYTE_IMAGES, HUGE_IMAGE, LARGE_IMAGE, TAG, WARM_UP_IMAGE, ImageSpec
from bench.mirror.mirror_servers import HOSTED_PREFIX, MirrorProgram
from bench.mirror.mirror_setup import MirrorSetup, cpu_when_idle
from bench.random_content import CONFIG_TYPE, MANIFEST_ACCEPT, MIB, SMALL_SIZE, digest_of, make_blob, make_manifest
from bench.report.measurements import BULK, CPU_GIB, P50, P99, RATE, SPEED, Figure, Sample
from bench.system.servers import PeakMemory, RunningServer

GIB = 1 << 30
FIRST = Figure("first", "first byte, ms beyond upstream's")
GROWTH = Figure("growth", "MiB PSS growth")
HEADERS = Figure("headers", "headers, ms beyond upstream's")
READERS = 16
MEMORY_LOOK_SECONDS = 0.1
"""Seconds between two looks at the memory."""


class FirstByteRow:
    """A blob of 256 MiB that is not there: how much later its first byte comes than from the upstream itself."""

    name = "first-byte"
    title = "cold blob of 256 MiB"
    figures: tuple[Figure, ...] = (FIRST, HEADERS)
    images: Sequence[ImageSpec] = FIRST_BYTE_IMAGES
    max_peer_rounds: int | None = None

    def trial(self, stage: MirrorSetup, mirror: MirrorProgram) -> Sample:
        pairs = []
        with stage.cold(mirror, stage.origin.url) as server:
            for image in FIRST_BYTE_IMAGES:
                straight = stage.pull(stage.origin, image).largest()
                pairs.append((stage.pull(server, image).largest(), straight))
        first = statistics.median(through.first - straight.first for through, straight in pairs)
        headers = statistics.median(through.headers - straight.headers for through, straight in pairs)
        return {FIRST.key: first * 1e3, HEADERS.key: headers * 1e3}


class FillRow:
    """A blob of 1 GiB that is not there, from a fast upstream."""

    name = "fill"
    title = "cold blob of 1 GiB"
    figures: tuple[Figure, ...] = (HEADERS, SPEED, CPU_GIB)
    images: Sequence[ImageSpec] = (LARGE_IMAGE,)
    max_peer_rounds: int | None = None

    def trial(self, stage: MirrorSetup, mirror: MirrorProgram) -> Sample:
        straight = stage.pull(stage.origin, LARGE_IMAGE).largest()
        with stage.cold(mirror, stage.origin.url) as server:
            before = server.cpu()
            through = stage.pull(server, LARGE_IMAGE).largest()
            used = cpu_when_idle(server) - before
        return {
            HEADERS.key: (through.headers - straight.headers) * 1e3,
            SPEED.key: through.size / MIB / through.whole,
            CPU_GIB.key: used * GIB / through.size,
        }


class BesideFillRow:
    """Manifests while 2 GiB come in from a fast upstream: of an image hosted here, by tag, or of a mirrored one that is
    there already, by digest."""

    figures: tuple[Figure, ...] = (P99, P50, RATE, BULK)
    images: Sequence[ImageSpec] = (HUGE_IMAGE,)

    def __init__(self, name: str, title: str, *, hosted: bool) -> None:
        self.name, self.title, self._hosted = name, title, hosted
        self.max_peer_rounds: int | None = 0 if hosted else None
        """docker-registry in proxy mode hosts nothing."""

    def trial(self, stage: MirrorSetup, mirror: MirrorProgram) -> Sample:
        moved = []
        with stage.cold(mirror, stage.origin.url) as server:
            path, body = self._target(stage, server)
            with HttpClient(server.port) as client:
                if client.ask("GET", path, headers={"Accept": MANIFEST_ACCEPT}, expect=200).body != body:
                    raise TrialFailed(f"{server.name} gave something else for GET {path}")
            seen = wrk.run_wrk_during(
                lambda: moved.append(stage.pull(server, HUGE_IMAGE)),
                server.url + path,
                size=len(body),
                headers={"Accept": MANIFEST_ACCEPT},
            )
        speed = moved[0].size / MIB / moved[0].seconds
        return {P99.key: seen.p99, P50.key: seen.p50, RATE.key: seen.rate, BULK.key: speed}

    def _target(self, stage: MirrorSetup, server: RunningServer) -> tuple[str, bytes]:
        """The path of a manifest, and what it gives."""
        if not self._hosted:
            body = stage.of(WARM_UP_IMAGE).body
            return f"/v2/{WARM_UP_IMAGE.repo}/manifests/{digest_of(body)}", body
        repo, layer, config = f"{HOSTED_PREFIX}/app", make_blob(bytes(SMALL_SIZE)), make_blob(b"{}", CONFIG_TYPE)
        body = make_manifest(config, [layer])
        with HttpClient(server.port) as client:
            for each in (layer, config):
                client.push_blob(repo, each.digest, each.content)
            client.put_manifest(repo, TAG, body)
        return f"/v2/{repo}/manifests/{TAG}", body


class FillMemoryRow:
    """How much larger the process tree becomes while 2 GiB come in and are followed by many readers. docker-registry
    fetches them for each reader, which takes its time: one round shows it."""

    name = "fill-memory"
    title = f"cold blob of 2 GiB, {READERS} readers"
    figures: tuple[Figure, ...] = (GROWTH, BULK)
    images: Sequence[ImageSpec] = (HUGE_IMAGE,)
    max_peer_rounds: int | None = 1

    def trial(self, stage: MirrorSetup, mirror: MirrorProgram) -> Sample:
        with stage.cold(mirror, stage.origin.url) as server:
            before = server.pss()
            with PeakMemory(MEMORY_LOOK_SECONDS) as watch:
                watch.watch_server(server)
                # Hashing for all of them would take the processor from the server.
                pulled = stage.pull(server, HUGE_IMAGE, READERS, verified=1)
            peak = max(watch.peaks.get(server.name, 0), server.pss())
        return {GROWTH.key: (peak - before) / MIB, BULK.key: pulled.size / MIB / pulled.seconds}
