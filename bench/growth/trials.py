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

from bench import wrk
from bench.content import ACCEPT, Blob, digest_of, manifest
from bench.errors import TrialFailed
from bench.figures import Figure
from bench.growth.store import EACH, MANY, Size, made, repository
from bench.servers import Server
from bench.wire import MANIFEST_TYPE, Client

BASE = "base/app"
SAMPLES = 20
PAGES = 50
PAGE = 100
SPREAD = 10
"""Repositories that tags are put to, the same number in every store."""

HUNDRED = Figure("hundred", "requests/s", more=True)
MANIFEST = Figure("manifest", "requests/s", more=True)
ANEW = Figure("anew", "requests/s", more=True)
AS_ASKED = Figure("as_asked", "requests/s", more=True)
PUT = Figure("put", "per s", more=True)
TAGS = Figure("tags", "ms")
CATALOG = Figure("catalog", "ms")
START = Figure("start", "s")
FIGURES = (
    (HUNDRED, "manifest by tag, the same hundred"),
    (MANIFEST, "manifest by tag, all over, beside tag PUTs"),
    (ANEW, "manifest by tag, all over, no answer ready"),
    (AS_ASKED, "manifest by tag, all over, as asked"),
    (PUT, "tag PUT, one connection"),
    (TAGS, "page of 100 tags"),
    (CATALOG, "page of 100 repositories"),
    (START, "start"),
)


@dataclass(frozen=True)
class Grown:
    """A store with what is needed to ask for its content."""

    folder: Path
    size: Size
    config: Blob
    layers: tuple[Blob, ...]
    disk: int
    """Bytes it takes."""
    seconds: float
    """It took to make."""

    @property
    def name(self) -> str:
        return f"{self.size.manifests:,}"


def check(one: Grown, server: Server) -> None:
    """Reads some of the rows back through the API. Raises TrialFailed when one is not as pushed."""
    chance = random.Random(1)
    with Client(server.port) as client:
        for _ in range(SAMPLES):
            repo, tag = repository(chance.randrange(one.size.repositories)), f"t{chance.randrange(EACH)}"
            wanted = made(repo, tag, one.config, one.layers)
            for reference in (tag, wanted.digest):
                path = f"/v2/{repo}/manifests/{reference}"
                answer = client.ask("GET", path, headers={"Accept": ACCEPT}, expect=200)
                if answer.body != wanted.body or answer.headers["docker-content-digest"] != wanted.digest:
                    raise TrialFailed(f"GET {path} gave another manifest")
            path = f"/v2/{repo}/blobs/{one.layers[0].digest}"
            if client.ask("GET", path, expect=200).body != one.layers[0].content:
                raise TrialFailed(f"GET {path} gave another blob")


def _bodies(one: Grown) -> tuple[bytes, bytes]:
    return manifest(one.config, one.layers, "first"), manifest(one.config, one.layers, "second")


def _targets(one: Grown) -> list[str]:
    """Repositories all over the store."""
    step = max(1, one.size.repositories // SPREAD)
    return [repository(number * step) for number in range(SPREAD)]


def prepare(one: Grown, server: Server) -> None:
    """Puts the two manifests that tags will move between, and reads a little of everything."""
    for place, body in enumerate(_bodies(one)):
        (one.folder / f"{place}.json").write_bytes(body)
    with Client(server.port) as client:
        for repo in _targets(one):
            for body in _bodies(one):
                client.put_manifest(repo, digest_of(body), body)
    _manifests(one, server, 1)


def trial(one: Grown, server: Server, seconds: float, number: int, note: Callable[[str, float], None]) -> None:
    """One round; each value goes to `note`. Raises TrialFailed."""
    note(HUNDRED.key, _manifests(one, server, seconds, repositories=SPREAD))
    with ThreadPoolExecutor(1) as beside:
        putting = beside.submit(_puts, one, server, seconds, f"beside{number}-")
        note(MANIFEST.key, _manifests(one, server, seconds))
        putting.result()
    note(ANEW.key, _manifests(one, server, seconds, anew=True))
    note(AS_ASKED.key, _manifests(one, server, seconds))
    note(PUT.key, _puts(one, server, seconds, f"put{number}-"))
    chance = random.Random(number)
    with Client(server.port) as client:
        note(
            TAGS.key,
            _page(client, f"/v2/{MANY}/tags/list", "tags", lambda: f"t{chance.randrange(one.size.many // 2):07d}"),
        )
        last = max(1, one.size.repositories // 2)
        note(CATALOG.key, _page(client, "/v2/_catalog", "repositories", lambda: repository(chance.randrange(last))))


def _puts(one: Grown, server: Server, seconds: float, prefix: str) -> float:
    """Tags put in a second, to the same number of repositories all over the store."""
    files = [str(one.folder / f"{place}.json") for place in range(2)]
    arguments = [MANIFEST_TYPE, prefix, str(5 * SPREAD), *files, *_targets(one)]
    return wrk.load(server.url, seconds, connections=1, script="put_tags", arguments=arguments).rate


def _manifests(
    one: Grown, server: Server, seconds: float, *, repositories: int | None = None, anew: bool = False
) -> float:
    """Requests/s for tags at random, of so many repositories that are spread over the store; None: of all. `anew`: with
    a condition that never holds, so that no answer is ready."""
    asked = repositories or one.size.repositories
    step = one.size.repositories // asked
    arguments = [ACCEPT, str(asked), str(step), str(EACH), *(['"another"'] if anew else [])]
    size = len(made(repository(0), "t0", one.config, one.layers).body)
    return wrk.load(server.url, seconds, size=size, script="any_tag", arguments=arguments).rate


def _page(client: Client, path: str, key: str, after: Callable[[], str]) -> float:
    """Milliseconds for a page from the middle of a list, the median of some. Raises TrialFailed for a page that is
    not in order, or not after what it was to follow."""
    times = []
    for _ in range(PAGES):
        last = after()
        begun = time.perf_counter()
        answer = client.ask("GET", f"{path}?n={PAGE}&last={quote(last, safe='')}", expect=200)
        times.append((time.perf_counter() - begun) * 1000)
        items = json.loads(answer.body)[key]
        if items != sorted(items) or not items or items[0] <= last or len(items) > PAGE:
            raise TrialFailed(f"{path} after {last} is not a page: {items[:3]}")
    return statistics.median(times)
