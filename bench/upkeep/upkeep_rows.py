"""Rows of the table of the bench `upkeep`: a garbage collection, an eviction of cached images, and requests for
manifests, alone and during each of these jobs. Each row is measured on stores of several sizes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.errors import TrialFailed
from bench.growth.synthetic_store import repository_name
from bench.loaders.http_client import MANIFEST_ACCEPT, HttpClient
from bench.loaders.load_report import LoadReport
from bench.loaders.wrk import run_wrk
from bench.random_content import BlobContent, digest_of
from bench.report.measurements import CPU_SECONDS, P50, P99, RATE, SECONDS, Figure, Sample
from bench.runner import Row
from bench.system.servers import Meter, RunningServer, ServerProgram
from bench.upkeep.upkeep_store import (
    TAGS_PER_REPOSITORY,
    UPSTREAM,
    AddedContent,
    UpkeepStore,
    manifest_of_layer,
    small_layer,
)

REMOVAL_COUNT = 1000
"""Number of blobs that a garbage collection removes, and of images that an eviction removes."""
JOB_TIMEOUT = 600.0  # seconds
CHECKED_SAMPLES = 20
WARM_UP_SECONDS = 1.0
PAUSE_MILLISECONDS = 10
"""Each of wrk's connections waits this long after a response before it sends the next request. Without a pause, wrk's
requests would take all CPU time: requests would queue up, and the jobs would get no CPU time."""
IDLE_P99 = Figure("idle", "p99 ms just before")
SLOWDOWN = Figure("slowdown", "p99 to that just before")


@dataclass(frozen=True)
class FilledStore:
    """The data directory of one registry program, and the content in it."""

    name: str
    program: ServerProgram
    folder: Path
    content: UpkeepStore
    config: BlobContent
    disk_bytes: int
    build_seconds: float

    @property
    def count(self) -> int:
        """Number of blobs in the store."""
        return self.content.size.blobs

    @property
    def is_entrepot(self) -> bool:
        return self.program.is_entrepot


@dataclass(frozen=True)
class UpkeepTrial:
    """One trial: the measurement of one row on one store. `server`: the server of this store."""

    store: FilledStore
    server: RunningServer
    seconds: float


@dataclass(frozen=True)
class Removal:
    """A job that removes REMOVAL_COUNT blobs or images. `add`: adds the blobs or images to a store. `start`: starts the
    job that removes exactly the added ones, and returns the id of the job."""

    name: str
    add: Callable[[UpkeepStore], AddedContent]
    start: Callable[[UpkeepTrial, AddedContent], int]


def _start_collection(trial: UpkeepTrial, _: AddedContent) -> int:
    return _post(trial, "/api/v1/gc", {})


def _start_eviction(trial: UpkeepTrial, added: AddedContent) -> int:
    return _post(trial, "/api/v1/cache/evict", {"upstream": UPSTREAM, "to": added.before.mirrored_bytes})


def _post(trial: UpkeepTrial, path: str, body: dict[str, object]) -> int:
    with HttpClient(trial.server.port) as client:
        headers = {"Content-Type": "application/json"}
        response = client.request("POST", path, json.dumps(body).encode(), headers, expect=202)
    return int(json.loads(response.body)["id"])


COLLECTION = Removal("collect", lambda store: store.add_garbage(REMOVAL_COUNT), _start_collection)
EVICTION = Removal("evict", lambda store: store.add_stale_images(REMOVAL_COUNT), _start_eviction)


def prepare_store(store: FilledStore, server: RunningServer) -> None:
    """Checks some of the store's content through the API, because its rows were inserted into the database in bulk.
    Then sends requests to warm up the server. Raises TrialFailed."""
    rng = random.Random(1)
    with HttpClient(server.port) as client:
        for _ in range(CHECKED_SAMPLES):
            repo = repository_name(rng.randrange(store.content.size.repositories))
            tag = rng.randrange(TAGS_PER_REPOSITORY)
            layer = small_layer(f"{repo}:{tag}")
            wanted = manifest_of_layer(store.config, layer)
            for reference in (f"t{tag}", digest_of(wanted)):
                if client.get_manifest(repo, reference).body != wanted:
                    raise TrialFailed(f"{repo}:{reference} is another manifest")
            client.check_blob(repo, layer.digest, layer.size)
    _get_manifests(UpkeepTrial(store, server, WARM_UP_SECONDS))


def _get_manifests(trial: UpkeepTrial, work: Callable[[], object] | None = None) -> LoadReport:
    """Gets pushed manifests by random tags of the whole store. Goes on for as long as `work` runs or, without `work`,
    for the length of a trial."""
    store = trial.store
    repositories, pause = str(store.content.size.repositories), str(PAUSE_MILLISECONDS)
    # "1": the step between the repositories' numbers; "": no If-None-Match.
    arguments = [MANIFEST_ACCEPT, repositories, "1", str(TAGS_PER_REPOSITORY), "", pause]
    size = len(manifest_of_layer(store.config, small_layer("")))
    url = trial.server.url
    if work is not None:
        return run_wrk(url, size=size, script="any_tag", arguments=arguments, work=work)
    return run_wrk(url, trial.seconds, size=size, script="any_tag", arguments=arguments)


def _remove(trial: UpkeepTrial, added: AddedContent, removal: Removal) -> float:
    """Runs the job and returns how many seconds it took. Raises TrialFailed unless the job removes all content in
    `added`, and nothing else."""
    seconds, _ = trial.store.content.wait_for_job(removal.start(trial, added), JOB_TIMEOUT)
    trial.store.content.check_gone(added)
    return seconds


def _time_removal(trial: UpkeepTrial, *, removal: Removal) -> Sample:
    added = removal.add(trial.store.content)
    meter = Meter(trial.server)
    seconds = _remove(trial, added, removal)
    return {SECONDS.key: seconds, CPU_SECONDS.key: meter.cpu()}


def _time_manifests(trial: UpkeepTrial) -> Sample:
    report = _get_manifests(trial)
    return {P99.key: report.p99, P50.key: report.p50, RATE.key: report.rate}


def _time_manifests_beside(trial: UpkeepTrial, *, removal: Removal) -> Sample:
    """Measures GETs of manifests twice: while no job runs, and while the removal runs."""
    added = removal.add(trial.store.content)
    idle = _get_manifests(trial)
    seconds = list[float]()
    report = _get_manifests(trial, lambda: seconds.append(_remove(trial, added, removal)))
    return {
        P99.key: report.p99,
        IDLE_P99.key: idle.p99,
        SLOWDOWN.key: report.p99 / idle.p99,
        P50.key: report.p50,
        RATE.key: report.rate,
        SECONDS.key: seconds[0],
    }


def upkeep_rows() -> list[Row[UpkeepTrial]]:
    """Returns the rows, in the order in which they are measured."""
    costs, load, beside = (SECONDS, CPU_SECONDS), (P99, P50, RATE), (P99, IDLE_P99, SLOWDOWN, P50, RATE, SECONDS)
    return [
        Row("collect", f"collection of {REMOVAL_COUNT:,} blobs", costs, partial(_time_removal, removal=COLLECTION)),
        Row("evict", f"eviction of {REMOVAL_COUNT:,} images", costs, partial(_time_removal, removal=EVICTION)),
        Row("manifest", "manifest by tag, all over", load, _time_manifests),
        Row(
            "manifest-beside-collect",
            "the same during a collection",
            beside,
            partial(_time_manifests_beside, removal=COLLECTION),
        ),
        Row(
            "manifest-beside-evict",
            "the same during an eviction",
            beside,
            partial(_time_manifests_beside, removal=EVICTION),
        ),
    ]
