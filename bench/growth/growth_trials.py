"""What is measured of a store that has grown."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from bench.loaders import wrk
from bench.loaders.http_client import MANIFEST_TYPE, HttpClient
from bench.random_content import MANIFEST_ACCEPT, BlobContent, digest_of, make_manifest
from bench.report.measurements import Figure
from bench.system.servers import RunningServer

BASE_REPO = "base/app"
CHECKED_SAMPLES = 20
PAGE_TRIALS = 50
PAGE_SIZE = 100
TARGET_REPOSITORIES = 10
"""Repositories that tags are put to, the same number in every store."""

HOT_MANIFESTS = Figure("hundred", "requests/s", more=True)
SPREAD_MANIFESTS = Figure("manifest", "requests/s", more=True)
UNCACHED_MANIFESTS = Figure("anew", "requests/s", more=True)
CACHED_MANIFESTS = Figure("as_asked", "requests/s", more=True)
TAG_PUTS = Figure("put", "per s", more=True)
TAGS_PAGE = Figure("tags", "ms")
CATALOG_PAGE = Figure("catalog", "ms")
START_TIME = Figure("start", "s")
GROWTH_FIGURES = (
    (HOT_MANIFESTS, "manifest by tag, the same hundred"),
    (SPREAD_MANIFESTS, "manifest by tag, all over, beside tag PUTs"),
    (UNCACHED_MANIFESTS, "manifest by tag, all over, no answer ready"),
    (CACHED_MANIFESTS, "manifest by tag, all over, as asked"),
    (TAG_PUTS, "tag PUT, one connection"),
    (TAGS_PAGE, "page of 100 tags"),
    (CATALOG_PAGE, "page of 100 repositories"),
    (START_TIME, "start"),
)


@dataclass(frozen=True)
class GrownStore:
    """A store with what is needed to ask for its content."""

    folder: Path
    size: StoreSize
    config: BlobContent
    layers: tuple[BlobContent, ...]
    disk: int
    """Bytes it takes."""
    seconds: float
    """It took to make."""

    @property
    def name(self) -> str:
        return f"{self.size.manifests:,}"


def check_store(one: GrownStore, server: RunningServer) -> None:
    """Reads some of the rows back through the API. Raises TrialFailed when one is not as pushed."""
    chance = random.Random(1)
    with HttpClient(server.port) as client:
        for _ in range(CHECKED_SAMPLES):
            repo, tag = (
                repository_name(chance.randrange(one.size.repositories)),
                f"t{chance.randrange(TAGS_PER_REPOSITORY)}",
            )
            wanted = manifest_of_tag(repo, tag, one.config, one.layers)
            for reference in (tag, wanted.digest):
                path = f"/v2/{repo}/manifests/{reference}"
                answer = client.ask("GET", path, headers={"Accept": MANIFEST_ACCEPT}, expect=200)
                if answer.body != wanted.body or answer.headers["docker-content-digest"] != wanted.digest:
                    raise TrialFailed(f"GET {path} gave another manifest")
            path = f"/v2/{repo}/blobs/{one.layers[0].digest}"
            if client.ask("GET", path, expect=200).body != one.layers[0].content:
                raise TrialFailed(f"GET {path} gave another blob")


def _bodies(one: GrownStore) -> tuple[bytes, bytes]:
    return make_manifest(one.config, one.layers, "first"), make_manifest(one.config, one.layers, "second")


def _targets(one: GrownStore) -> list[str]:
    """Repositories all over the store."""
    step = max(1, one.size.repositories // TARGET_REPOSITORIES)
    return [repository_name(number * step) for number in range(TARGET_REPOSITORIES)]


def prepare_store(one: GrownStore, server: RunningServer) -> None:
    """Puts the two manifests that tags will move between, and reads a little of everything."""
    for place, body in enumerate(_bodies(one)):
        (one.folder / f"{place}.json").write_bytes(body)
    with HttpClient(server.port) as client:
        for repo in _targets(one):
            for body in _bodies(one):
                client.put_manifest(repo, digest_of(body), body)
    _manifests(one, server, 1)


def run_growth_trial(
    one: GrownStore, server: RunningServer, seconds: float, number: int, note: Callable[[str, float], None]
) -> None:
    """One round; each value goes to `note`. Raises TrialFailed."""
    note(HOT_MANIFESTS.key, _manifests(one, server, seconds, repositories=TARGET_REPOSITORIES))
    with ThreadPoolExecutor(1) as beside:
        putting = beside.submit(_puts, one, server, seconds, f"beside{number}-")
        note(SPREAD_MANIFESTS.key, _manifests(one, server, seconds))
        putting.result()
    note(UNCACHED_MANIFESTS.key, _manifests(one, server, seconds, anew=True))
    note(CACHED_MANIFESTS.key, _manifests(one, server, seconds))
    note(TAG_PUTS.key, _puts(one, server, seconds, f"put{number}-"))
    chance = random.Random(number)
    with HttpClient(server.port) as client:
        note(
            TAGS_PAGE.key,
            _page(
                client,
                f"/v2/{MANY_TAGS_REPO}/tags/list",
                "tags",
                lambda: f"t{chance.randrange(one.size.many // 2):07d}",
            ),
        )
        last = max(1, one.size.repositories // 2)
        note(
            CATALOG_PAGE.key,
            _page(client, "/v2/_catalog", "repositories", lambda: repository_name(chance.randrange(last))),
        )


def _puts(one: GrownStore, server: RunningServer, seconds: float, prefix: str) -> float:
    """Tags put in a second, to the same number of repositories all over the store."""
    files = [str(one.folder / f"{place}.json") for place in range(2)]
    arguments = [MANIFEST_TYPE, prefix, str(5 * TARGET_REPOSITORIES), *files, *_targets(one)]
    return wrk.run_wrk(server.url, seconds, connections=1, script="put_tags", arguments=arguments).rate


def _manifests(
    one: GrownStore, server: RunningServer, seconds: float, *, repositories: int | None = None, anew: bool = False
) -> float:
    """Requests/s for tags at random, of so many repositories that are spread over the store; None: of all. `anew`: with
    a condition that never holds, so that no answer is ready."""
    asked = repositories or one.size.repositories
    step = one.size.repositories // asked
    arguments = [MANIFEST_ACCEPT, str(asked), str(step), str(TAGS_PER_REPOSITORY), *(['"another"'] if anew else [])]
    size = len(manifest_of_tag(repository_name(0), "t0", one.config, one.layers).body)
    return wrk.run_wrk(server.url, seconds, size=size, script="any_tag", arguments=arguments).rate


def _page(client: HttpClient, path: str, key: str, after: Callable[[], str]) -> float:
    """Milliseconds for a page from the middle of a list, the median of some. Raises TrialFailed for a page that is
    not in order, or not after what it was to follow."""
    times = []
    for _ in range(PAGE_TRIALS):
        last = after()
        begun = time.perf_counter()
        answer = client.ask("GET", f"{path}?n={PAGE_SIZE}&last={quote(last, safe='')}", expect=200)
        times.append((time.perf_counter() - begun) * 1000)
        items = json.loads(answer.body)[key]
        if items != sorted(items) or not items or items[0] <= last or len(items) > PAGE_SIZE:
            raise TrialFailed(f"{path} after {last} is not a page: {items[:3]}")
    return statistics.median(times)
