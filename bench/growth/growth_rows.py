"""Rows of the table of the bench `growth` for requests that programs send: GETs of manifests, PUTs of tags, and pages
of lists. Each row is measured on stores of several sizes."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from bench.errors import TrialFailed
from bench.growth.synthetic_store import (
    MANY_TAGS_REPO,
    TAGS_PER_REPOSITORY,
    StoreSize,
    manifest_of_tag,
    repository_name,
)
from bench.loaders.http_client import MANIFEST_ACCEPT, MANIFEST_TYPE, HttpClient
from bench.loaders.load_report import LoadReport, measure_load
from bench.loaders.wrk import run_wrk
from bench.random_content import BlobContent, digest_of, make_manifest
from bench.report.measurements import CPU, P99, RATE, Figure, Sample
from bench.runner import Row
from bench.system.servers import RunningServer, ServerProgram, started_server

CHECKED_SAMPLES = 20
"""Number of manifests whose content is checked before a store is measured."""
PAGE_TRIALS = 50
"""Number of requests whose median is the figure of a row for pages."""
PAGE_SIZE = 100
"""Number of items that a page of a list may have."""
SPREAD_REPOSITORIES = 10
"""Number of repositories, spread over the store, that get the tag PUTs. They hold the hundred manifests of the row "the
same hundred"."""
WARM_UP_SECONDS = 1.0
INDEXING_SECONDS = 3600.0
"""Longest time that the server may take to add all repositories of the store to its search index."""

HOT_MANIFESTS = Figure("hundred", "requests/s")
SPREAD_MANIFESTS = Figure("manifest", "requests/s")
UNCACHED_MANIFESTS = Figure("anew", "requests/s")
"""The row "no answer ready": the rate of requests whose responses the registry does not cache."""
CACHED_MANIFESTS = Figure("as_asked", "requests/s")
"""The row "as asked": the rate of requests as clients send them, whose responses the registry may cache."""
TAG_PUTS = Figure("put", "per s")
LOAD_RATES = (HOT_MANIFESTS, SPREAD_MANIFESTS, UNCACHED_MANIFESTS, CACHED_MANIFESTS, TAG_PUTS)


@dataclass(frozen=True)
class GrownStore:
    """The data directory of one registry program, and the content in it."""

    name: str
    program: ServerProgram
    folder: Path
    size: StoreSize
    config: BlobContent
    layers: tuple[BlobContent, ...]
    disk_bytes: int
    build_seconds: float

    @property
    def count(self) -> int:
        """Number of manifests in the store."""
        return self.size.manifests

    @property
    def is_entrepot(self) -> bool:
        return self.program.is_entrepot

    @property
    def bodies(self) -> tuple[bytes, bytes]:
        """Two manifests. The PUTs of the bench move tags from one to the other and back."""
        return make_manifest(self.config, self.layers, "first"), make_manifest(self.config, self.layers, "second")

    def spread_repositories(self) -> list[str]:
        """Returns SPREAD_REPOSITORIES repositories from all over the store."""
        step = max(1, self.size.repositories // SPREAD_REPOSITORIES)
        return [repository_name(number * step) for number in range(SPREAD_REPOSITORIES)]


@dataclass(frozen=True)
class GrowthTrial:
    """One trial of a row in a round: the store, and the server that serves it."""

    store: GrownStore
    server: RunningServer
    seconds: float
    round: int


Load = Callable[[GrowthTrial], LoadReport]


def prepare_store(store: GrownStore, server: RunningServer) -> None:
    """Checks some manifests of the store, waits for the search index, pushes the two manifests between which PUTs move
    tags, and warms up the server. Raises TrialFailed."""
    _check_store(store, server)
    if store.is_entrepot:
        _wait_for_index(server)
    for number, body in enumerate(store.bodies):
        (store.folder / f"{number}.json").write_bytes(body)
    with HttpClient(server.port) as client:
        for repo in store.spread_repositories():
            for body in store.bodies:
                client.put_manifest(repo, digest_of(body), body)
    _get_manifests(GrowthTrial(store, server, WARM_UP_SECONDS, 0))


def _check_store(store: GrownStore, server: RunningServer) -> None:
    """Reads some manifests and their layers through the API, because their rows were inserted into the database in
    bulk. Raises TrialFailed if a manifest or a layer has wrong content."""
    rng = random.Random(1)
    with HttpClient(server.port) as client:
        for _ in range(CHECKED_SAMPLES):
            repo = repository_name(rng.randrange(store.size.repositories))
            tag = f"t{rng.randrange(TAGS_PER_REPOSITORY)}"
            wanted = manifest_of_tag(repo, tag, store.config, store.layers)
            for reference in (tag, wanted.digest):
                answer = client.get_manifest(repo, reference)
                if answer.body != wanted.body or answer.headers["docker-content-digest"] != wanted.digest:
                    raise TrialFailed(f"{repo}:{reference} is another manifest")
            client.check_blob(repo, store.layers[0].digest, store.layers[0].size)


def _get_manifests(trial: GrowthTrial, *, repositories: int | None = None, uncached: bool = False) -> LoadReport:
    """Gets manifests by random tags. `repositories`: the number of repositories, spread over the store, whose tags are
    requested; None: all repositories. `uncached`: send an If-None-Match that no manifest matches, so that the registry
    does not cache the responses."""
    store = trial.store
    count = repositories or store.size.repositories
    step = store.size.repositories // count
    condition = ['"another"'] if uncached else []
    arguments = [MANIFEST_ACCEPT, str(count), str(step), str(TAGS_PER_REPOSITORY), *condition]
    size = len(manifest_of_tag(repository_name(0), "t0", store.config, store.layers).body)
    return run_wrk(trial.server.url, trial.seconds, size=size, script="any_tag", arguments=arguments)


def _get_manifests_beside_puts(trial: GrowthTrial) -> LoadReport:
    with ThreadPoolExecutor(1) as background:
        putting = background.submit(_put_tags, trial, prefix="beside")
        report = _get_manifests(trial)
        putting.result()
    return report


def _put_tags(trial: GrowthTrial, *, prefix: str = "put") -> LoadReport:
    """Puts tags to SPREAD_REPOSITORIES repositories, spread over the store."""
    files = [str(trial.store.folder / f"{number}.json") for number in range(2)]
    arguments = [MANIFEST_TYPE, f"{prefix}{trial.round}-", str(5 * SPREAD_REPOSITORIES), *files]
    arguments += trial.store.spread_repositories()
    return run_wrk(trial.server.url, trial.seconds, connections=1, script="put_tags", arguments=arguments)


def _measure_load(trial: GrowthTrial, *, key: str, load: Load) -> Sample:
    sample = measure_load(trial.server, partial(load, trial))
    return {**sample, key: sample[RATE.key]}


def _tags_pages(trial: GrowthTrial) -> Sample:
    # Names from the first half of the list, so that a full page follows each of them.
    rng, middle = random.Random(trial.round), trial.store.size.many // 2
    after = [f"t{rng.randrange(middle):07d}" for _ in range(PAGE_TRIALS)]
    return {"tags": _time_pages(trial.server, f"/v2/{MANY_TAGS_REPO}/tags/list", "tags", after)}


def _catalog_pages(trial: GrowthTrial) -> Sample:
    rng, middle = random.Random(trial.round), max(1, trial.store.size.repositories // 2)
    after = [repository_name(rng.randrange(middle)) for _ in range(PAGE_TRIALS)]
    return {"catalog": _time_pages(trial.server, "/v2/_catalog", "repositories", after)}


def _search_pages(trial: GrowthTrial) -> Sample:
    """Returns the median time for the first page of a search. The searched text alternates between a whole repository
    name and a text that many names contain."""
    rng, times = random.Random(trial.round), []
    with HttpClient(trial.server.port) as client:
        for number in range(PAGE_TRIALS):
            name = repository_name(rng.randrange(trial.store.size.repositories))
            word = "r/0" if number % 2 else name
            begun = time.perf_counter()
            answer = client.request("GET", f"/api/v1/search?q={quote(word, safe='')}", expect=200)
            times.append((time.perf_counter() - begun) * 1000)
            found = [item["repository"] for item in json.loads(answer.body)["repositories"]["items"]]
            if not found or not all(word in each for each in found):
                raise TrialFailed(f"a search for {word} finds {found[:3]}")
    return {"search": statistics.median(times)}


def _wait_for_index(server: RunningServer) -> None:
    """Waits until the server has added the whole store to its search index, so that the indexing slows down no
    measurement. Returns at once if the server is an earlier version, which has no search. Raises TrialFailed."""
    deadline = time.monotonic() + INDEXING_SECONDS
    with HttpClient(server.port) as client:
        while True:
            answer = client.request("GET", "/api/v1/search?q=", expect=(200, 404))
            if answer.status == 404 or not json.loads(answer.body)["indexing"]:
                return
            if time.monotonic() > deadline:
                raise TrialFailed("the search index is not complete")
            time.sleep(1)


def _time_pages(server: RunningServer, path: str, key: str, after: list[str]) -> float:
    """Gets the page that follows each name in `after`, and returns the median time in milliseconds. Raises TrialFailed
    if a page is not in order or does not follow the name."""
    times = []
    with HttpClient(server.port) as client:
        for last in after:
            begun = time.perf_counter()
            answer = client.request("GET", f"{path}?n={PAGE_SIZE}&last={quote(last, safe='')}", expect=200)
            times.append((time.perf_counter() - begun) * 1000)
            items = json.loads(answer.body)[key]
            if items != sorted(items) or not items or items[0] <= last or len(items) > PAGE_SIZE:
                raise TrialFailed(f"{path} after {last} is not a page: {items[:3]}")
    return statistics.median(times)


def _load_row(rate: Figure, title: str, load: Load, *costs: Figure) -> Row[GrowthTrial]:
    return Row(rate.key, title, (rate, *costs), partial(_measure_load, key=rate.key, load=load))


def growth_rows() -> list[Row[GrowthTrial]]:
    """Returns the rows that are measured on running servers, in the order of measurement. The rows of `page_rows` come
    after them."""
    hundred = partial(_get_manifests, repositories=SPREAD_REPOSITORIES)
    uncached = partial(_get_manifests, uncached=True)
    return [
        _load_row(HOT_MANIFESTS, "manifest by tag, the same hundred", hundred, CPU, P99),
        # Without CPU, because one cannot tell the CPU time of the GETs from that of the PUTs.
        _load_row(SPREAD_MANIFESTS, "manifest by tag, all over, beside tag PUTs", _get_manifests_beside_puts, P99),
        _load_row(UNCACHED_MANIFESTS, "manifest by tag, all over, no answer ready", uncached, CPU, P99),
        _load_row(CACHED_MANIFESTS, "manifest by tag, all over, as asked", _get_manifests, CPU, P99),
        _load_row(TAG_PUTS, "tag PUT, one connection", _put_tags, CPU, P99),
        Row("tags", "page of 100 tags", (Figure("tags", "ms"),), _tags_pages),
        Row("catalog", "page of 100 repositories", (Figure("catalog", "ms"),), _catalog_pages),
        Row("search", "first page of a search", (Figure("search", "ms"),), _search_pages, peer_rounds=0),
    ]


def _time_start(store: GrownStore) -> Sample:
    with started_server(store.program, store.folder) as server:
        return {"start": server.start_seconds}


START_ROW = Row("start", "start", (Figure("start", "s"),), _time_start)
"""The row that is measured while no server serves the store."""
