"""Rows of the table of the bench `mirror` for large blobs that the mirror downloads from the upstream: the time until
the response to the client begins, the CPU time and memory of the download, and the latency of other requests during it.

A fill is such a download into the mirror's cache. A cold blob is a blob that the mirror does not have yet."""

from __future__ import annotations

import statistics
from functools import partial

from bench.errors import TrialFailed
from bench.loaders.http_client import MANIFEST_ACCEPT, HttpClient
from bench.loaders.image_pull import PullResult
from bench.loaders.wrk import run_wrk
from bench.mirror.mirror_images import FIRST_BYTE_IMAGES, HUGE_IMAGE, LARGE_IMAGE, TAG, WARM_UP_IMAGE
from bench.mirror.mirror_trial import MirrorTrial, wait_until_idle
from bench.random_content import GIB, MIB, digest_of, make_config, push_content, small_layers
from bench.report.measurements import BULK, CPU_GIB, P50, P99, RATE, SPEED, Figure, Sample
from bench.runner import Row
from bench.system.servers import HOSTED_PREFIX, Meter, RunningServer, sampled_memory

FIRST = Figure("first", "first byte, ms beyond upstream's")
GROWTH = Figure("growth", "MiB PSS growth")
HEADERS = Figure("headers", "headers, ms beyond upstream's")
READERS = 16
"""Number of clients that download the blob while the mirror downloads it."""
MEMORY_INTERVAL_SECONDS = 0.1


def _time_first_byte(trial: MirrorTrial) -> Sample:
    """Measures how much later the headers and the first byte of a cold blob come from the mirror than from the upstream
    itself."""
    pairs = []
    with trial.cold_mirror(trial.upstream.url) as server:
        for image in FIRST_BYTE_IMAGES:
            direct = trial.pull(trial.upstream, image).largest()
            pairs.append((trial.pull(server, image).largest(), direct))
    first = statistics.median(mirrored.first - direct.first for mirrored, direct in pairs)
    headers = statistics.median(mirrored.headers - direct.headers for mirrored, direct in pairs)
    return {FIRST.key: first * 1e3, HEADERS.key: headers * 1e3}


def _fill(trial: MirrorTrial) -> Sample:
    """Measures the fill of one cold blob: the delay of the headers, the speed, and the mirror's CPU time."""
    direct = trial.pull(trial.upstream, LARGE_IMAGE).largest()
    with trial.cold_mirror(trial.upstream.url) as server:
        meter = Meter(server)
        mirrored = trial.pull(server, LARGE_IMAGE).largest()
        wait_until_idle(server)
        used = meter.cpu()
    return {
        HEADERS.key: (mirrored.headers - direct.headers) * 1e3,
        SPEED.key: mirrored.size / MIB / mirrored.whole,
        CPU_GIB.key: used * GIB / mirrored.size,
    }


def _get_manifests_beside_fill(trial: MirrorTrial, *, hosted: bool) -> Sample:
    """Gets manifests for as long as the mirror downloads a blob of 2 GiB from a fast upstream. `hosted`: get a manifest
    that was pushed to the mirror, instead of a mirrored one."""
    pulled = list[PullResult]()
    with trial.cold_mirror(trial.upstream.url) as server:
        path, body = _hosted_manifest(server) if hosted else _mirrored_manifest(trial)
        with HttpClient(server.port) as client:
            if client.request("GET", path, headers={"Accept": MANIFEST_ACCEPT}, expect=200).body != body:
                raise TrialFailed(f"{server.name} gave something else for GET {path}")
        report = run_wrk(server.url + path, size=len(body), work=lambda: pulled.append(trial.pull(server, HUGE_IMAGE)))
    speed = pulled[0].size / MIB / pulled[0].seconds
    return {P99.key: report.p99, P50.key: report.p50, RATE.key: report.rate, BULK.key: speed}


def _hosted_manifest(server: RunningServer) -> tuple[str, bytes]:
    """Pushes an image to the mirror. Returns the path for its manifest, by tag, and the body of the manifest."""
    repo, layers = f"{HOSTED_PREFIX}/app", small_layers(1)
    with HttpClient(server.port) as client:
        body = push_content(client, repo, TAG, make_config(layers), layers)
    return f"/v2/{repo}/manifests/{TAG}", body


def _mirrored_manifest(trial: MirrorTrial) -> tuple[str, bytes]:
    """Returns the path, by digest, for a manifest that the mirror has cached, and the body of the manifest."""
    body = trial.image(WARM_UP_IMAGE).body
    return f"/v2/{WARM_UP_IMAGE.repo}/manifests/{digest_of(body)}", body


def _measure_fill_memory(trial: MirrorTrial) -> Sample:
    """Measures how much the memory of the process tree grows while many clients download a cold blob of 2 GiB."""
    with trial.cold_mirror(trial.upstream.url) as server:
        pss_before = server.pss()
        peaks = dict[str, int]()
        with sampled_memory(server, MEMORY_INTERVAL_SECONDS, peaks):
            # Only one client verifies the digest: if all did, hashing would leave too little CPU time for the server.
            pulled = trial.pull(server, HUGE_IMAGE, READERS, verified=1)
    return {GROWTH.key: (peaks[server.name] - pss_before) / MIB, BULK.key: pulled.size / MIB / pulled.seconds}


def fill_rows() -> list[Row[MirrorTrial]]:
    """Returns the rows in the order in which they are measured."""
    beside = (P99, P50, RATE, BULK)
    hosted = partial(_get_manifests_beside_fill, hosted=True)
    mirrored = partial(_get_manifests_beside_fill, hosted=False)
    return [
        Row("first-byte", "cold blob of 256 MiB", (FIRST, HEADERS), _time_first_byte),
        Row("fill", "cold blob of 1 GiB", (HEADERS, SPEED, CPU_GIB), _fill),
        # docker-registry takes no part, because it accepts no pushes while it is a mirror.
        Row("hosted-beside-fill", "hosted manifest beside a fill of 2 GiB", beside, hosted, peer_rounds=0),
        Row("cached-beside-fill", "mirrored manifest beside a fill of 2 GiB", beside, mirrored),
        # docker-registry takes part in one round only: it needs long, because it fetches the blob once for each reader.
        Row(
            "fill-memory", f"cold blob of 2 GiB, {READERS} readers", (GROWTH, BULK), _measure_fill_memory, peer_rounds=1
        ),
    ]
