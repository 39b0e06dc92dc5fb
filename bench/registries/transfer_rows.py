"""Large blobs, and what small requests feel of them.

A real docker pulls a large image.
"""

from __future__ import annotations

import time

from bench.loaders import curl_transfers, wrk
from bench.loaders.curl_transfers import background_transfers
from bench.loaders.http_client import HOST, HttpClient
from bench.random_content import MANIFEST_ACCEPT, MIB, make_config, make_manifest, make_unique, write_layer
from bench.registries.trial_setup import APP_REPO, TrialSetup
from bench.report.measurements import (
    BULK,
    CPU_GIB,
    CPU_SECONDS,
    LOADER_GIB,
    P50,
    P99,
    RATE,
    SECONDS,
    SPEED,
    Figure,
    Sample,
)
from bench.system.docker_daemon import DockerDaemon
from bench.system.memory_prefault import prefault_memory
from bench.system.process_tree import children_cpu
from bench.system.servers import RunningServer

GIB = 1 << 30
PULL_COUNT = 4
PUSH_REPO = "bench/pushed"


class BulkPullRow:
    """A large blob, by as many programs at once, one after the other for about the trial's time."""

    figures: tuple[Figure, ...] = (SPEED, CPU_GIB, LOADER_GIB)
    rounds: int | None = None

    def __init__(self, name: str, title: str, at_once: int) -> None:
        self.name, self.title, self._at_once = name, title, at_once

    def prepare(self, stage: TrialSetup, server: RunningServer) -> None:
        stage.fill_large(server)

    def trial(self, stage: TrialSetup, server: RunningServer, number: int) -> Sample:
        large = stage.large
        times = max(1, round(stage.seconds / self._at_once))
        url = f"{server.url}/v2/{APP_REPO}/blobs/{large.digest}"
        before, loaders = server.cpu(), children_cpu()
        speed = curl_transfers.download_blob(url, large.size, times, self._at_once)
        gib = large.size * times * self._at_once / GIB
        return {
            SPEED.key: speed,
            CPU_GIB.key: (server.cpu() - before) / gib,
            LOADER_GIB.key: (children_cpu() - loaders) / gib,
        }


class BulkPushRow:
    """POST, one streamed PATCH, PUT; new content each time, and the time is that of all three."""

    name = "push-256m"
    title = "push of 256 MiB"
    figures: tuple[Figure, ...] = (SPEED, CPU_GIB, LOADER_GIB)
    rounds: int | None = None

    def prepare(self, stage: TrialSetup, server: RunningServer) -> None:
        pass

    def trial(self, stage: TrialSetup, server: RunningServer, number: int) -> Sample:
        content = make_unique(stage.pushed)
        prefault_memory(GIB)  # last, since what is free goes back to the host within a second or two
        gib = content.size / GIB
        with HttpClient(server.port) as client:
            before, loaders, begun = server.cpu(), children_cpu(), time.perf_counter()
            where = client.start_upload(PUSH_REPO)
            where = curl_transfers.stream_upload(server.url + where, stage.pushed)
            client.close_upload(where, content.digest)
            seconds = time.perf_counter() - begun
            sample = {
                SPEED.key: content.size / MIB / seconds,
                CPU_GIB.key: (server.cpu() - before) / gib,
                LOADER_GIB.key: (children_cpu() - loaders) / gib,
            }
            path = f"/v2/{PUSH_REPO}/blobs/{content.digest}"
            client.ask("HEAD", path, headers={"Accept": "*/*"}, expect=200)
        return sample


class UnderBulkRow:
    """Manifests by tag while four bulk pulls and a bulk push run. No memory is touched before: what the pushes leave of
    it would go back to the host during the trial, which may stop the whole machine for 30 ms at a time."""

    name = "manifest-under-bulk"
    title = "manifest by tag beside 4 pulls, 1 push"
    figures: tuple[Figure, ...] = (P99, P50, RATE, BULK)
    rounds: int | None = None

    def prepare(self, stage: TrialSetup, server: RunningServer) -> None:
        stage.fill_large(server)
        _ = stage.pushed  # made now: what is written in a trial disturbs it

    def trial(self, stage: TrialSetup, server: RunningServer, number: int) -> Sample:
        with background_transfers(server, APP_REPO, stage.large.digest, PULL_COUNT, stage.pushed) as moved:
            before, begun = moved(), time.perf_counter()
            seen = wrk.run_wrk(
                f"{server.url}/v2/{APP_REPO}/manifests/latest",
                stage.seconds,
                size=len(stage.body),
                headers={"Accept": MANIFEST_ACCEPT},
            )
            speed = (moved() - before) / MIB / (time.perf_counter() - begun)
        return {P99.key: seen.p99, P50.key: seen.p50, RATE.key: seen.rate, BULK.key: speed}


LARGE_IMAGE_REPO = "bench/large"
LARGE_IMAGE_LAYERS = 4
LAYER_SIZE = 256 * MIB


class DockerPullRow:
    """Wall-clock time of `docker pull`; docker unpacks meanwhile, which takes most of it."""

    name = "docker-pull"
    title = "docker pull, 1 GiB in 4 layers"
    figures: tuple[Figure, ...] = (SECONDS, CPU_SECONDS)
    rounds: int | None = 3

    def __init__(self, layer_size: int = LAYER_SIZE) -> None:
        self._layer_size = layer_size
        self._docker: DockerDaemon | None = None

    def prepare(self, stage: TrialSetup, server: RunningServer) -> None:
        if self._docker is None:
            self._docker = stage.stack.enter_context(DockerDaemon.running(stage.folder / "docker"))
        folder = stage.folder / "layers"
        folder.mkdir(exist_ok=True)
        layers = [write_layer(folder, f"layer{number}", self._layer_size) for number in range(LARGE_IMAGE_LAYERS)]
        described = make_config(layers)
        with HttpClient(server.port) as client:
            for each in (described, *layers):
                client.push_blob(LARGE_IMAGE_REPO, each.digest, each.content)
            client.put_manifest(LARGE_IMAGE_REPO, "latest", make_manifest(described, layers))
        for layer in folder.iterdir():
            layer.unlink()

    def trial(self, stage: TrialSetup, server: RunningServer, number: int) -> Sample:
        assert self._docker is not None
        name = f"{HOST}:{server.port}/{LARGE_IMAGE_REPO}:latest"
        before, begun = server.cpu(), time.perf_counter()
        self._docker("pull", "--quiet", name)
        sample = {SECONDS.key: time.perf_counter() - begun, CPU_SECONDS.key: server.cpu() - before}
        self._docker("image", "inspect", name)
        self._docker("image", "rm", "--force", name)
        return sample
